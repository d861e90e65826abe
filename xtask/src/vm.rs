//! `cargo xtask vm-test`: the kernel tests on other kernels than this machine's.
//!
//! Boots Debian's kernels in qemu with software emulation, from an initramfs with the agent and the tests as `cargo xtask test`
//! builds them, and runs `penstock doctor` and each test binary there. Prints the table of results for `docs/kernels.md`. Files are
//! under `target/vm`.

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
    /// Debian's kernel to boot
    #[arg(long, value_enum, default_value = "all")]
    kernel: Choice,
    /// Do not mount cgroup v2 in the machine, and run only `doctor`
    #[arg(long)]
    without_cgroup: bool,
    /// Run only tests whose names contain one of these
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
    /// The newest that Debian packages
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
        // The other kernels run after a failure too.
        let row = steps.step(series.name(), || test_kernel(series, &payload, args));
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
        bail!("failed on {}; the output of the machines is in target/vm/*/console.log", failed.join(", "));
    }
    Ok(())
}

fn test_kernel(series: Series, payload: &image::Payload, args: &Args) -> Result<Row> {
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
