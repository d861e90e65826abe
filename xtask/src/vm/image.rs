//! Writes the machine's only file system: busybox, the agent, the tests, their libraries, and the plan of what to run.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{
    archive::{Kernel, find_file},
    binaries::Run,
    cpio::Cpio,
};
use crate::command::{command, find, output, root, run};

/// The first process of the machine.
const INIT: &str = include_str!("init.sh");
/// For `/dev/net/tun`, with which a test simulates a network; for pairs of interfaces, and for programs attached to them by tc.
const MODULES: [&str; 4] = ["tun", "veth", "sch_ingress", "cls_bpf"];
/// A program of this machine instead of busybox's.
const TOOL: &str = "ip";
/// Mount points.
const FOLDERS: [&str; 4] = ["/proc", "/sys", "/dev", "/tmp"];

/// The files that are the same for every kernel, with their paths in the machine.
pub(crate) struct Payload(Vec<(String, PathBuf)>);

impl Payload {
    /// A test looks for the agent's binary in its own folder or one folder up, so the layout is cargo's.
    pub(crate) fn new(agent: &Path, tests: &[(&str, PathBuf)]) -> Result<Self> {
        let mut files = vec![("/tests/penstock".to_owned(), agent.to_owned())];
        files.extend(tests.iter().map(|(name, path)| (format!("/tests/deps/{name}"), path.clone())));
        if let Some(path) = find(TOOL) {
            files.push((format!("/tools/{TOOL}"), path));
        }
        let mut libraries = Vec::new();
        for (_, path) in &files {
            let list = output(command("ldd").arg(path)).with_context(|| format!("ldd {}", path.display()))?;
            libraries.extend(self::libraries(&list));
        }
        libraries.sort();
        libraries.dedup();
        for (_, path) in &mut files {
            *path = stripped(path)?;
        }
        files.extend(libraries.into_iter().map(|path| (path.clone(), PathBuf::from(path))));
        Ok(Self(files))
    }

    pub(crate) fn write(&self, to: &Path, kernel: &Kernel, plan: &[Run]) -> Result<()> {
        let file = File::create(to).with_context(|| format!("writing {}", to.display()))?;
        let mut cpio = Cpio::new(BufWriter::new(file));
        for folder in FOLDERS {
            cpio.folder(folder)?;
        }
        cpio.file("/init", INIT.as_bytes())?;
        cpio.file("/bin/busybox", &read(&kernel.busybox)?)?;
        cpio.file("/plan", lines(plan).as_bytes())?;
        for module in MODULES {
            // A kernel without this file has the module built in.
            if let Some(content) = module_in(&kernel.roots, module)? {
                cpio.file(&format!("/modules/{module}.ko"), &content)?;
            }
        }
        for (path, file) in &self.0 {
            cpio.file(path, &read(file)?)?;
        }
        Ok(cpio.finish()?)
    }
}

/// One line for each run: name, limit in seconds, arguments.
fn lines(plan: &[Run]) -> String {
    plan.iter().map(|run| format!("{} {} {}\n", run.name, run.limit, run.args.join(" "))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The paths in ldd's output: `libc.so.6 => /lib/libc.so.6 (0x7f…)`, and the loader's line without an arrow.
fn libraries(list: &str) -> Vec<String> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    list.lines().filter_map(path).collect()
}

/// A copy without debug information, which is nine tenths of the file, to save the machine's memory.
fn stripped(program: &Path) -> Result<PathBuf> {
    if find("strip").is_none() {
        return Ok(program.to_owned());
    }
    let folder = root().join("target/vm/stripped");
    fs::create_dir_all(&folder)?;
    let to = folder.join(program.file_name().context("a program has a name")?);
    run(command("strip").arg("--strip-debug").arg("-o").arg(&to).arg(program))?;
    Ok(to)
}

/// The content of a module; newer kernels have compressed ones.
fn module_in(roots: &[PathBuf], name: &str) -> Result<Option<Vec<u8>>> {
    let Some(path) = find_file(roots, &format!("{name}.ko*")) else { return Ok(None) };
    if path.extension().is_some_and(|extension| extension == "xz") {
        let unpacked = command("xz").args(["--decompress", "--stdout"]).arg(&path).output().context("starting xz")?;
        ensure!(unpacked.status.success(), "xz cannot unpack {}", path.display());
        return Ok(Some(unpacked.stdout));
    }
    read(&path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_ldd() {
        let list = "\tlinux-vdso.so.1 (0x00007f)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007f)\n\t/lib64/ld-linux.so.2 (0x00007f)\n";
        assert_eq!(libraries(list), ["/lib/libc.so.6", "/lib64/ld-linux.so.2"]);
    }

    #[test]
    fn plan_has_one_line_per_run() {
        let plan = [Run { name: "broken", limit: 60, args: vec!["--test-threads=2".into(), "wrong".into()] }];
        assert_eq!(lines(&plan), "broken 60 --test-threads=2 wrong\n");
    }
}
