//! A network namespace for a test, removed on drop. Needs root and `ip`.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// Exists until this is dropped and no socket or thread is left in it.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Creates a namespace with loopback up.
    pub fn new() -> Result<Self> {
        // A thread stays in the namespace it enters, so a runtime's thread must not enter one.
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("could not create a network namespace")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        });
        let namespace = Self(made.join().expect("the thread panicked")?);
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Another namespace, connected to the caller's by a pair of interfaces: `name` has the address `here` on this side and `there`
    /// on the other, each with its prefix length.
    pub fn connected(name: &str, here: &str, there: &str) -> Result<Self> {
        let namespace = Self::new()?;
        ip(&format!("link add {name} type veth peer name {name} netns {}", namespace.path()))?;
        ip(&format!("addr add {here} dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        namespace.ip(&format!("addr add {there} dev {name}"))?;
        namespace.ip(&format!("link set {name} up"))?;
        Ok(namespace)
    }

    /// Connects two namespaces by a pair of interfaces, each with this name in its namespace and this address with its prefix length.
    pub fn join(ends: [(&Self, &str, &str); 2]) -> Result<()> {
        let [(near, name, _), (far, far_name, _)] = ends;
        near.ip(&format!("link add {name} type veth peer name {far_name} netns {}", far.path()))?;
        for (place, name, address) in ends {
            let no_dad = if address.contains(':') { " nodad" } else { "" };
            place.ip(&format!("addr add {address} dev {name}{no_dad}"))?;
            place.ip(&format!("link set {name} up"))?;
        }
        Ok(())
    }

    /// Writes a setting below `/proc/sys`; the kernel shows each thread those of its own namespace.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{name}");
        self.run(|| std::fs::write(&path, value))
            .and_then(|written| written.with_context(|| format!("writing {value} to {path}")))
    }

    /// Loads rules of nftables, and returns what `nft` prints.
    pub fn nft(&self, rules: &str) -> Result<String> {
        let output = self.run(|| Command::new("nft").arg(rules).output())?.context("starting nft")?;
        ensure!(output.status.success(), "nft {rules}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs on a thread in the namespace. Sockets that it creates stay in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(&self.0, CloneFlags::CLONE_NEWNET).context("could not enter a network namespace")?;
                Ok(work())
            });
            thread.join().expect("the thread panicked")
        })
    }

    pub fn ip(&self, command: &str) -> Result<()> {
        self.run(|| ip(command))?
    }

    /// The path under which other processes see it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A child inherits the namespace of the thread that starts it.
fn ip(command: &str) -> Result<()> {
    let output = Command::new("ip").args(command.split(' ')).output().context("starting ip")?;
    ensure!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
