//! The headers that carry what the body names, to picker, endpoint and routes.

use std::collections::HashMap;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::config::Bbr;

#[derive(Debug)]
pub struct ModelHeaders {
    model: HeaderName,
    base_model: HeaderName,
    /// By model: of adapters, and of the base models themselves.
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

    /// A name with control characters in it is no header, and none is set.
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
    HeaderValue::from_bytes(name.as_bytes()).ok()
}
