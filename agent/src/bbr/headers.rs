//! The headers that carry the body's model to picker, endpoint and routes.

use std::collections::HashMap;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{config::Bbr, http::head::trimmed};

#[derive(Debug)]
pub struct ModelHeaders {
    model: HeaderName,
    base_model: HeaderName,
    /// Base models by model name; a base model maps to itself.
    base_models: HashMap<String, HeaderValue>,
}

impl ModelHeaders {
    pub fn new(bbr: &Bbr) -> Self {
        let own = bbr.base_models.values().map(|base| (base, base));
        let entry = |(model, base): (&String, &String)| Some((model.clone(), value(base)?));
        Self {
            model: bbr.header.clone(),
            base_model: bbr.base_model_header.clone(),
            base_models: own.chain(&bbr.base_models).filter_map(entry).collect(),
        }
    }

    /// Sets the headers for `model`. No header can hold a name with control characters or with white space at its beginning or end,
    /// so none is set for it.
    pub fn set(&self, headers: &mut HeaderMap, model: &str) {
        if let Some(base) = self.base_models.get(model) {
            headers.insert(self.base_model.clone(), base.clone());
        }
        if let Some(model) = value(model) {
            headers.insert(self.model.clone(), model);
        }
    }
}

fn value(name: &str) -> Option<HeaderValue> {
    HeaderValue::from_bytes(name.as_bytes()).ok().filter(|value| trimmed(value.as_bytes()).len() == value.len())
}
