//! `[bbr]`: what is read from bodies, and what it means if it is not there.

use super::{Bbr, MissingModel, document::Section, value};

pub(super) fn bbr(section: &mut Section<'_>) -> Bbr {
    let default = Bbr::default();
    let bbr = Bbr {
        enabled: section.read("enabled", value::boolean).unwrap_or(default.enabled),
        header: section.read("header", value::header_name).unwrap_or(default.header),
        missing_model: missing_model(section),
        base_model_header: section.read("base_model_header", value::header_name).unwrap_or(default.base_model_header),
        base_models: section.entries(
            "base_models",
            r#"a table of adapters and base models, such as { "sql-lora" = "llama-3.1-8b" }"#,
            value::non_empty,
        ),
    };
    if bbr.base_model_header == bbr.header {
        let expected = format_args!("another header than bbr.header ({})", bbr.header);
        section.reject("base_model_header", &bbr.base_model_header, expected);
    }
    for (adapter, base) in &bbr.base_models {
        if bbr.base_models.get(base).is_some_and(|further| further != base) {
            let found = format_args!("{base:?} for {adapter:?}, itself an adapter");
            section.reject("base_models", found, "base models that have none");
        }
    }
    bbr
}

/// A `default_model` alone says that it is to be used.
fn missing_model(section: &mut Section<'_>) -> MissingModel {
    #[derive(Clone, Copy)]
    enum Rule {
        Pass,
        Default,
        Reject,
    }
    const RULES: &[(&str, Rule)] = &[("pass", Rule::Pass), ("default", Rule::Default), ("reject", Rule::Reject)];
    let rule = section.read("missing_model", value::one_of(RULES));
    let model = section.read("default_model", value::non_empty);
    match rule {
        Some(Rule::Pass | Rule::Reject) if section.has("default_model") => {
            section.reject("default_model", "a model that nothing uses", r#"missing_model = "default" beside it"#);
            MissingModel::Pass
        }
        Some(Rule::Default) if !section.has("default_model") => {
            section.reject("missing_model", r#""default" without a default_model"#, "default_model beside it");
            MissingModel::Pass
        }
        Some(Rule::Reject) => MissingModel::Reject,
        Some(Rule::Pass) => MissingModel::Pass,
        Some(Rule::Default) | None => model.map_or(MissingModel::Pass, MissingModel::Default),
    }
}
