//! `cargo xtask vm-test`: the tests of the kernel's part, on other kernels than this machine's.
//!
//! Debian's kernels boot in qemu, in software, from an initramfs that carries the agent and the tests as `cargo xtask test`
//! builds them. There the agent's `doctor` runs, then each test binary. The table of results goes to standard output and
//! stands in `docs/kernels.md`. Everything fetched or made is under `target/vm`.

mod archive;
mod binaries;
mod console;
mod cpio;
mod image;
mod machine;
mod table;

use std::path::PathBuf;

use anyhow::{Result, bail};

use self::{
    archive::Series,
    machine::{Cgroup, Machine},
    table::Row,
};
use crate::{command::root, ebpf, progress::Steps, setup};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which of Debian's kernels
    #[arg(long, value_enum, default_value = "all")]
    kernel: Choice,
    /// Leave cgroup v2 out of the machine, and only ask `doctor` there
    #[arg(long)]
    without_cgroup: bool,
    /// Only tests whose name contains one of these
    #[arg(last = true)]
    filter: Vec<String>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Choice {
    /// Debian 12's
    #[value(name = "6.1")]
    Bookworm,
    /// Debian 13's
    #[value(name = "6.12")]
    Trixie,
    /// The newest that Debian has packaged
    Newest,
    All,
}

impl Choice {
    fn series(self) -> Vec<Series> {
        match self {
            Self::Bookworm => vec![Series::Bookworm],
            Self::Trixie => vec![Series::Trixie],
            Self::Newest => vec![Series::Newest],
            Self::All => vec![Series::Bookworm, Series::Trixie, Series::Newest],
        }
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let mut steps = Steps::default();
    steps.step("setup", || {
        setup::kernel_build()?;
        setup::vm_needs()
    })?;
    steps.step("kernel program", || ebpf::build(ebpf::Warnings::Allow))?;
    let payload = steps.step("build", || {
        let tests = if args.without_cgroup { vec![] } else { binaries::tests()? };
        image::Payload::new(&binaries::agent()?, &tests)
    })?;

    let mut rows = Vec::new();
    for series in args.kernel.series() {
        // What goes wrong with one kernel is no reason to know nothing of the next.
        let row = steps.step(series.name(), || one(series, &payload, args));
        rows.push((series, row));
    }

    let mut failed = Vec::new();
    let mut table = Vec::new();
    for (series, row) in rows {
        match row {
            Ok(row) => {
                if !row.passed() {
                    failed.push(series.name().to_owned());
                }
                table.push(row);
            }
            Err(error) => failed.push(format!("{}: {error:#}", series.name())),
        }
    }
    print!("{}", table::render(&table));
    if !failed.is_empty() {
        bail!("failed on {}; what the machines printed is in target/vm/*/console.log", failed.join(", "));
    }
    Ok(())
}

fn one(series: Series, payload: &image::Payload, args: &Args) -> Result<Row> {
    let folder = folder(series);
    let kernel = archive::Archive::open(series, &folder)?.kernel()?;
    let plan = if args.without_cgroup { vec![] } else { binaries::plan(&args.filter) };
    let initramfs = folder.join("initramfs");
    payload.write(&initramfs, &kernel, &plan)?;
    let cgroup = if args.without_cgroup { Cgroup::Absent } else { Cgroup::Mounted };
    let machine = Machine { kernel: &kernel.image, initramfs: &initramfs, cgroup };
    let (report, time) = machine.run(&folder.join("console.log"))?;
    let planned = plan.iter().map(|run| run.name).collect();
    Ok(Row { version: kernel.version, cgroup, planned, filtered: !args.filter.is_empty(), report, time })
}

fn folder(series: Series) -> PathBuf {
    root().join("target/vm").join(series.name())
}
