//! `[bbr]`: reading the model from request bodies, and what happens if a body names none.

use std::collections::BTreeMap;

use http::HeaderName;
use serde_json::json;

use super::{
    document::Section,
    settings::{Group, choice, keys, settings},
    value::{self, Custom},
};

const BASE_MODELS: &str = r#"a table of adapters and base models, such as { "sql-lora" = "llama-3.1-8b" }"#;

settings! {
    /// Reading the model from request bodies (body-based routing).
    pub struct Bbr {
        /// Whether the model is read: from bodies whose Content-Type is JSON (`application/json` or ending in `+json`), from the field
        /// `model` of forms (`multipart/form-data`), and from the query of requests without a body (`?model=`). All other bodies, and
        /// those without a Content-Type, are forwarded unread.
        pub enabled: bool = true => value::boolean(),
        /// Request header that carries the model to the picker and the endpoint.
        pub header: HeaderName = HeaderName::from_static("x-gateway-model-name")
            => value::header_name().named("model_header").was("header"),
        /// What happens to a request whose JSON body names no model.
        pub missing_model: MissingModel = MissingModel::Pass => keys::<MissingModelKeys>(),
        /// Request header that carries the base model to the picker and the endpoint, if `base_models` has the model.
        pub base_model_header: HeaderName = HeaderName::from_static("x-gateway-base-model-name") => value::header_name(),
        /// Base model of each adapter. A base model in this table is its own base model.
        pub base_models: BTreeMap<String, String> = BTreeMap::new()
            => base_models().example(json!({ "sql-lora": "llama-3.1-8b" })),
    }
}

/// What happens to a request whose JSON body names no model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MissingModel {
    /// The request is forwarded without a model.
    #[default]
    Pass,
    /// The request gets this model (`default_model`).
    Default(String),
    /// The request is answered with 400.
    Reject,
}

settings! {
    /// The keys of [`MissingModel`]. `default_model` without `missing_model` means `missing_model = "default"`.
    struct MissingModelKeys {
        /// What happens to a request whose JSON body has no model, or one that is empty, null, an array or an object. A number,
        /// `true` or `false` names a model by its text. If only `default_model` is set, this is `"default"`.
        missing_model: MissingModelRule = MissingModelRule::Pass => value::choice(),
        /// With `missing_model = "default"` only: the model of such requests.
        default_model: Option<String> = None => value::non_empty().optional("unknown"),
    }
}

choice! {
    /// The values of `missing_model`.
    enum MissingModelRule {
        /// The request is forwarded without a model.
        Pass = "pass",
        /// The request gets `default_model` as its model.
        Default = "default",
        /// The request is answered with 400.
        Reject = "reject",
    }
}

fn base_models() -> Custom<BTreeMap<String, String>> {
    Custom {
        words: BASE_MODELS,
        schema: json!({ "type": "object", "additionalProperties": { "type": "string", "minLength": 1 } }),
        read: |section, key| Some(section.entries(key, BASE_MODELS, |value| value::non_empty().parse(value))),
        show: |models| (!models.is_empty()).then(|| json!(models)),
    }
}

impl Group for MissingModelKeys {
    type Value = MissingModel;

    fn resolve(self, section: &Section<'_>) -> MissingModel {
        let has_rule = section.has("missing_model");
        match self.missing_model {
            MissingModelRule::Pass | MissingModelRule::Reject if has_rule && section.has("default_model") => {
                section.reject("default_model", "a setting without effect", r#"missing_model = "default""#);
                MissingModel::Pass
            }
            MissingModelRule::Default if !section.has("default_model") => {
                section.reject(
                    "missing_model",
                    r#""default" without a default_model"#,
                    "default_model in the same section",
                );
                MissingModel::Pass
            }
            MissingModelRule::Reject => MissingModel::Reject,
            MissingModelRule::Pass if has_rule => MissingModel::Pass,
            MissingModelRule::Default | MissingModelRule::Pass => {
                self.default_model.map_or(MissingModel::Pass, MissingModel::Default)
            }
        }
    }

    fn of(value: &MissingModel) -> Self {
        let (missing_model, default_model) = match value {
            MissingModel::Pass => (MissingModelRule::Pass, None),
            MissingModel::Default(model) => (MissingModelRule::Default, Some(model.clone())),
            MissingModel::Reject => (MissingModelRule::Reject, None),
        };
        Self { missing_model, default_model }
    }
}

impl Bbr {
    pub(super) fn check(&self, section: &Section<'_>) {
        for (setting, header) in [("model_header", &self.header), ("base_model_header", &self.base_model_header)] {
            if header.as_str().starts_with("x-gateway-destination-endpoint") {
                section.reject(setting, header, "another header than those in which the picker names endpoints");
            }
        }
        if self.base_model_header == self.header {
            let expected = format_args!("another header than bbr.model_header ({})", self.header);
            section.reject("base_model_header", &self.base_model_header, expected);
        }
        for (adapter, base) in &self.base_models {
            if self.base_models.get(base).is_some_and(|further| further != base) {
                let found = format_args!("{base:?} for {adapter:?}, which is itself an adapter");
                section.reject("base_models", found, "base models that have no other base model");
            }
        }
    }
}
