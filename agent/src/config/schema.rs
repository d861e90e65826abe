//! Prints the JSON Schema of the configuration file, for editors and for tools that generate the file.

use serde_json::{Map, Value as Json, json};

use super::{
    Config,
    settings::{SettingKey, Settings as _, Shape},
};

/// Returns a JSON document. It accepts every valid file and rejects most invalid ones; only `penstock config check` knows the rules
/// that concern several settings.
pub fn json_schema() -> String {
    let mut schema = object(&Config::describe());
    schema["$schema"] = "http://json-schema.org/draft-07/schema#".into();
    schema["title"] = "Penstock's configuration".into();
    format!("{schema:#}\n")
}

/// A table that has only these keys.
pub(super) fn object(keys: &[SettingKey]) -> Json {
    let mut properties = Map::new();
    for key in keys {
        let schema = property(key);
        if let Some(old_name) = key.old_name {
            let renamed = json!({ "deprecated": true, "description": format!("Now {}.", key.name) });
            properties.insert(old_name.to_owned(), merged(schema.clone(), renamed));
        }
        properties.insert(key.name.to_owned(), schema);
    }
    let required: Vec<&str> = keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    json!({ "type": "object", "properties": properties, "required": required, "additionalProperties": false })
}

fn property(key: &SettingKey) -> Json {
    let schema = match &key.shape {
        Shape::Section(keys) => object(keys),
        Shape::Sections(keys) => json!({ "type": "array", "items": object(keys) }),
        Shape::Value { schema, default, example, .. } => {
            let mut schema = schema.clone();
            if let Some(default) = default {
                schema["default"] = default.clone();
            }
            if let Some(example) = example {
                schema["examples"] = json!([example]);
            }
            schema
        }
    };
    if key.doc.is_empty() { schema } else { merged(schema, json!({ "description": key.doc.join("\n\n") })) }
}

fn merged(mut schema: Json, more: Json) -> Json {
    if let (Json::Object(schema), Json::Object(more)) = (&mut schema, more) {
        schema.extend(more);
    }
    schema
}
