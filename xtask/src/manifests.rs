//! `cargo xtask manifests`: renders deploy/kubernetes from the Helm chart, and puts the JSON Schema of the settings into that of the
//! chart's values. With `--check` it writes nothing, and fails on a file that is not current.

use std::fs;

use anyhow::{Context as _, Result, bail};
use serde_json::{Map, Value};

use crate::{
    command::{command, line, output, root},
    setup::deployment::{helm, helm_needs},
};

const CHART: &str = "deploy/helm/penstock";
pub(crate) const VALUES_SCHEMA: &str = "deploy/helm/penstock/values.schema.json";
const SETTINGS_SCHEMA: &str = "docs/penstock.schema.json";
const EXAMPLE: &str = "deploy/kubernetes/penstock.toml";
/// Everything of the values' schema but `config`.
const VALUES: &str = include_str!("manifests/values.schema.json");
/// The API server whose fields the plain manifests may use: Services have `trafficDistribution: PreferSameNode`.
const KUBERNETES: &str = "1.34.0";

/// A manifest, with the values that differ from the chart's.
const MANIFESTS: [(&str, &[&str]); 2] = [
    ("deploy/kubernetes/penstock.yaml", &[]),
    ("deploy/kubernetes/penstock-host-network.yaml", &["--set", "hostNetwork=true"]),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Write nothing; fail if a file is not current
    #[arg(long)]
    check: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    helm_needs()?;
    // Before the chart is rendered, because helm checks the values with it.
    finish(args, VALUES_SCHEMA, &values_schema()?)?;
    for (file, values) in MANIFESTS {
        finish(args, file, &rendered(values)?)?;
    }
    Ok(())
}

/// Writes or compares the file.
fn finish(args: &Args, file: &str, text: &str) -> Result<()> {
    let path = root().join(file);
    if !args.check {
        fs::write(&path, text).with_context(|| format!("writing {file}"))?;
    } else if fs::read_to_string(&path).with_context(|| format!("reading {file}"))? != text {
        bail!("{file} is not current: run `cargo xtask manifests`");
    }
    println!("{file} is current");
    Ok(())
}

pub(crate) fn values_schema() -> Result<String> {
    let mut schema: Value = serde_json::from_str(VALUES)?;
    let settings =
        fs::read_to_string(root().join(SETTINGS_SCHEMA)).with_context(|| format!("reading {SETTINGS_SCHEMA}"))?;
    let mut settings: Map<String, Value> =
        serde_json::from_str(&settings).with_context(|| format!("parsing {SETTINGS_SCHEMA}"))?;
    // A part of a schema does not name its dialect.
    settings.remove("$schema");
    schema["properties"]["config"] = Value::Object(settings);
    Ok(serde_json::to_string_pretty(&schema)? + "\n")
}

/// The manifest of the example configuration, with its namespace and without what says that Helm manages it.
fn rendered(values: &[&str]) -> Result<String> {
    let mut render = command(helm());
    render.args(["template", "penstock", CHART, "--namespace", "penstock", "--kube-version", KUBERNETES]);
    render.args(["--set-file", &format!("configText={EXAMPLE}")]).args(values);
    let text = output(&mut render).with_context(|| format!("{} failed", line(&render)))?;
    let kept = text.lines().filter(|line| {
        let line = line.trim_start();
        !["# Source:", "helm.sh/chart:", "app.kubernetes.io/managed-by:"].iter().any(|start| line.starts_with(start))
    });
    let kept: String = kept.map(|line| format!("{}\n", line.trim_end())).collect();
    Ok(format!(
        "# Rendered by `cargo xtask manifests` from the chart in {CHART} with the configuration in {EXAMPLE}.\n\
         # For Kubernetes 1.34 and later; before, set the Service's trafficDistribution to PreferClose (1.31), or remove it.\n\
         apiVersion: v1\nkind: Namespace\nmetadata:\n  name: penstock\n  labels:\n    app.kubernetes.io/name: penstock\n    \
         # Capabilities, and with the host's network its paths, exceed the other levels of Pod Security.\n    \
         pod-security.kubernetes.io/enforce: privileged\n{kept}"
    ))
}
