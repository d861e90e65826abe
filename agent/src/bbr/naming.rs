//! Determines the model that a request body names.
//!
//! Takes the body in pieces, without content coding; returns the model as soon as it is known, and counts each outcome
//! once. Only bodies with a JSON Content-Type are read: GIE's BBR answers others with 400, which would break every file
//! upload. Of a form (`multipart/form-data`), the field `model` is read; a form without one is forwarded like any other
//! body. Of a request without a body, the query's `model` counts. A number, `true` or `false` counts as a model by its text; null, an array, an object and an empty string do
//! not. A body in UTF-16 or UTF-32 names no model.

use std::sync::Arc;

use http::HeaderMap;

use super::{
    Model, ModelScanner, NamingError, Summary,
    form::{FormScanner, model_in_query},
    lead::{Encoding, Lead},
};
use crate::{
    config::{Bbr, MissingModel},
    http::media::{content_type, is_json, media_type},
    metrics::{BodyModel, Metrics},
};

pub struct Naming {
    /// None if the body is not read as JSON, or no longer read.
    scanner: Option<ModelScanner>,
    /// None if the body is not read as a form, or no longer read.
    form: Option<FormScanner>,
    /// The first bytes, until the encoding is known.
    lead: Option<Lead>,
    named: Named,
    /// The model in the query, used if the body turns out to be empty.
    queried: Option<String>,
    /// `"stream": true` was found in the complete body.
    streams: bool,
    rejects: bool,
    metrics: Arc<Metrics>,
}

enum Named {
    /// Not known yet; never known if the body is not read.
    Unknown,
    Model(String),
    Missing,
}

impl Naming {
    /// Creates the reader for a request with these headers and this query.
    pub fn new(bbr: &Bbr, headers: &HeaderMap, query: Option<&str>, has_body: bool, metrics: &Arc<Metrics>) -> Self {
        let reads = bbr.enabled && has_body;
        let queried = query.filter(|_| bbr.enabled).and_then(model_in_query);
        let (named, queried) =
            if has_body { (Named::Unknown, queried) } else { (queried.map_or(Named::Unknown, Named::Model), None) };
        Self {
            scanner: (reads && is_json(&media_type(headers))).then(ModelScanner::new),
            form: reads.then(|| FormScanner::new(content_type(headers))).flatten(),
            lead: Some(Lead::default()),
            named,
            queried,
            streams: false,
            rejects: bbr.missing_model == MissingModel::Reject,
            metrics: Arc::clone(metrics),
        }
    }

    /// Whether the model is known, or known to be missing.
    pub fn is_settled(&self) -> bool {
        self.scanner.is_none() && self.form.is_none() || !matches!(self.named, Named::Unknown)
    }

    /// Whether a request without a model is refused.
    pub fn rejects(&self) -> bool {
        self.rejects
    }

    /// The model that the body names, or the configured default if it names none.
    pub fn model<'a>(&'a self, bbr: &'a Bbr) -> Option<&'a str> {
        match (&self.named, &bbr.missing_model) {
            (Named::Model(model), _) | (Named::Missing, MissingModel::Default(model)) => Some(model),
            (Named::Unknown | Named::Missing, _) => None,
        }
    }

    /// Whether the body, which was read to its end, asks for a stream.
    pub fn streams(&self) -> bool {
        self.streams
    }

    /// Reads the next bytes of the body.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), NamingError> {
        self.read_form(bytes)?;
        if let Some(lead) = &mut self.lead {
            if !lead.take(&mut bytes) {
                return Ok(());
            }
            self.begin()?;
        }
        self.scan(bytes)
    }

    fn read_form(&mut self, bytes: &[u8]) -> Result<(), NamingError> {
        let Some(form) = &mut self.form else { return Ok(()) };
        form.feed(bytes)?;
        match (&self.named, form.model()) {
            (Named::Unknown, Some(model)) if !model.is_empty() => {
                let model = model.to_owned();
                self.settle(Model::Found(model))
            }
            _ => Ok(()),
        }
    }

    /// Detects the encoding once the first bytes have arrived or the body has ended, and starts the scan.
    fn begin(&mut self) -> Result<(), NamingError> {
        let (Some(lead), Some(scanner)) = (self.lead.take(), &mut self.scanner) else { return Ok(()) };
        match lead.encoding() {
            Encoding::Utf8(mark) => {
                scanner.skip(mark);
                self.scan(&lead.bytes()[mark..])
            }
            Encoding::Other => self.give_up(),
        }
    }

    /// Stops reading a body that has turned out to be empty. The request counts as one without a body (RFC 9112 §6.3).
    pub fn skip(&mut self) {
        (self.scanner, self.form) = (None, None);
        if let Some(model) = self.queried.take() {
            self.named = Named::Model(model);
        }
    }

    /// Stops reading a body that cannot be read. Unless a model was found before, it counts as missing.
    pub fn give_up(&mut self) -> Result<(), NamingError> {
        self.form = None;
        if self.scanner.take().is_some() && matches!(self.named, Named::Unknown) {
            return self.settle(Model::NotYet);
        }
        Ok(())
    }

    fn scan(&mut self, bytes: &[u8]) -> Result<(), NamingError> {
        let Some(scanner) = &mut self.scanner else { return Ok(()) };
        scanner.feed(bytes)?;
        match (&self.named, scanner.model()) {
            (Named::Unknown, Model::NotYet) | (Named::Model(_) | Named::Missing, _) => Ok(()),
            (Named::Unknown, model) => {
                let model = model.clone();
                self.settle(model)
            }
        }
    }

    /// Finishes a complete body; a JSON body must be valid to its end.
    pub fn end(&mut self) -> Result<(), NamingError> {
        self.form = None;
        self.begin()?;
        let Some(scanner) = self.scanner.take() else { return Ok(()) };
        let Summary { model, stream } = scanner.finish()?;
        self.streams = stream == Some(true);
        if matches!(self.named, Named::Unknown) { self.settle(model) } else { Ok(()) }
    }

    fn settle(&mut self, model: Model) -> Result<(), NamingError> {
        let (found, missing) = match model {
            Model::Found(model) if !model.is_empty() => (Ok(model), ""),
            Model::Found(_) => (Err(BodyModel::Empty), "an empty one"),
            Model::NotAString(text) if is_scalar(&text) => (Ok(text), ""),
            Model::NotAString(_) => (Err(BodyModel::NotFound), "a null, array or object"),
            Model::NotYet => (Err(BodyModel::NotFound), "none"),
        };
        self.metrics.body_model(found.as_ref().map_or_else(|&why| why, |_| BodyModel::Found));
        match found {
            Ok(model) => self.named = Named::Model(model),
            Err(_) if self.rejects => return Err(NamingError::Missing { found: missing }),
            Err(_) => self.named = Named::Missing,
        }
        Ok(())
    }
}

/// Whether the JSON text of a non-string value is a number, `true` or `false`. Text that was cut is not.
fn is_scalar(text: &str) -> bool {
    !text.starts_with(['[', '{']) && text != "null" && !text.ends_with('…')
}

#[cfg(test)]
mod tests;
