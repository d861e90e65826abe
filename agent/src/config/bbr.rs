//! `[bbr]`: what is read from bodies, and what it means if it is not there.

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
    /// The model, read from request bodies.
    pub struct Bbr {
        /// Read the model from bodies whose Content-Type is JSON (`application/json`, `+json`). Other bodies, and those without a
        /// Content-Type, pass unread.
        pub enabled: bool = true => value::boolean(),
        /// Request header that carries the model to picker and endpoint.
        pub header: HeaderName = HeaderName::from_static("x-gateway-model-name")
            => value::header_name().named("model_header").was("header"),
        /// What it means when a JSON body names no model.
        pub missing_model: MissingModel = MissingModel::Pass => keys::<MissingModelKeys>(),
        /// Request header that carries the base model, for models that `base_models` knows.
        pub base_model_header: HeaderName = HeaderName::from_static("x-gateway-base-model-name") => value::header_name(),
        /// Adapters and their base models. A base model in this table is its own.
        pub base_models: BTreeMap<String, String> = BTreeMap::new()
            => base_models().example(json!({ "sql-lora": "llama-3.1-8b" })),
    }
}

/// What it means when a JSON body names no model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum MissingModel {
    /// The request goes on without a model.
    #[default]
    Pass,
    /// It is for this model: `default_model`.
    Default(String),
    /// 400.
    Reject,
}

settings! {
    /// A `default_model` alone says that it is to be used.
    struct MissingModelKeys {
        /// A JSON body without a model, or with one that is empty, null, an array or an object. A number, `true` and `false` name a
        /// model by their text.
        missing_model: MissingModelRule = MissingModelRule::Pass => value::choice(),
        /// With `missing_model = "default"` only: the model that is meant.
        default_model: Option<String> = None => value::non_empty().optional("unknown"),
    }
}

choice! {
    /// The values of `missing_model`.
    enum MissingModelRule {
        /// The request goes on without a model.
        Pass = "pass",
        /// It is for `default_model`.
        Default = "default",
        /// 400.
        Reject = "reject",
    }
}

fn base_models() -> Custom<BTreeMap<String, String>> {
    Custom {
        words: BASE_MODELS,
        schema: json!({ "type": "object", "additionalProperties": { "type": "string", "minLength": 1 } }),
        read: |section, key| Some(section.entries(key, BASE_MODELS, |value| value::non_empty().parse(value))),
        show: |_| None,
    }
}

impl Group for MissingModelKeys {
    type Value = MissingModel;

    fn resolve(self, section: &Section<'_>) -> MissingModel {
        let has_rule = section.has("missing_model");
        match self.missing_model {
            MissingModelRule::Pass | MissingModelRule::Reject if has_rule && section.has("default_model") => {
                section.reject("default_model", "a model that nothing uses", r#"missing_model = "default" beside it"#);
                MissingModel::Pass
            }
            MissingModelRule::Default if !section.has("default_model") => {
                section.reject("missing_model", r#""default" without a default_model"#, "default_model beside it");
                MissingModel::Pass
            }
            MissingModelRule::Reject => MissingModel::Reject,
            MissingModelRule::Pass if has_rule => MissingModel::Pass,
            MissingModelRule::Default | MissingModelRule::Pass => {
                self.default_model.map_or(MissingModel::Pass, MissingModel::Default)
            }
        }
    }
}

impl Bbr {
    pub(super) fn check(&self, section: &Section<'_>) {
        if self.base_model_header == self.header {
            let expected = format_args!("another header than bbr.model_header ({})", self.header);
            section.reject("base_model_header", &self.base_model_header, expected);
        }
        for (adapter, base) in &self.base_models {
            if self.base_models.get(base).is_some_and(|further| further != base) {
                let found = format_args!("{base:?} for {adapter:?}, itself an adapter");
                section.reject("base_models", found, "base models that have none");
            }
        }
    }
}
