//! Fetches packages of other Debian suites than this machine's, with apt lists and sources of its own under `target/vm`. Reads the
//! mirror's address from the system's configuration and changes nothing there.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    command::{command, output},
    progress::quietly,
};

/// The keys of every suite; installed on each Debian.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const BUSYBOX: &str = "busybox-static";
/// A list that cannot be fetched is an error, not a warning.
const UPDATE: [&str; 3] = ["-o", "APT::Update::Error-Mode=any", "update"];

/// A series of kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Series {
    Bookworm,
    Trixie,
    Newest,
}

impl Series {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "6.1",
            Self::Trixie => "6.12",
            Self::Newest => "newest",
        }
    }

    fn suites(self) -> &'static [&'static str] {
        match self {
            Self::Bookworm => &["bookworm", "bookworm-updates"],
            Self::Trixie => &["trixie", "trixie-updates"],
            Self::Newest => &["sid", "trixie-backports"],
        }
    }

    fn security_suite(self) -> Option<&'static str> {
        match self {
            Self::Bookworm => Some("bookworm-security"),
            Self::Trixie => Some("trixie-security"),
            Self::Newest => None,
        }
    }

    /// The pattern of its kernel packages: those for the cloud, which are small.
    fn packages(self) -> &'static str {
        match self {
            Self::Bookworm => r"^linux-image-6\.1\.[^ ]*-cloud-amd64$",
            Self::Trixie => r"^linux-image-6\.12\.[^ ]*-cloud-amd64$",
            Self::Newest => r"^linux-image-[0-9][^ ]*-cloud-amd64$",
        }
    }
}

/// An unpacked kernel.
pub(crate) struct Kernel {
    /// The version of Debian's package, such as `6.1.176-1`.
    pub(crate) version: String,
    pub(crate) image: PathBuf,
    /// The folders of its unpacked packages; one of them holds the modules.
    pub(crate) roots: Vec<PathBuf>,
    /// busybox, of the same suite.
    pub(crate) busybox: PathBuf,
}

pub(crate) struct Archive {
    series: Series,
    folder: PathBuf,
}

impl Archive {
    /// Fetches the package lists. If the mirror cannot be reached, uses the lists of an earlier run, if any.
    pub(crate) fn open(series: Series, folder: &Path) -> Result<Self> {
        if output(command("dpkg").arg("--print-architecture")).as_deref() != Some("amd64") {
            bail!("vm-test requires Debian on amd64, whose apt fetches the kernels");
        }
        let archive = Self { series, folder: folder.to_owned() };
        for sub in ["lists/partial", "cache/archives/partial", "packages"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        let listed = output(command("apt-get").args(["update", "--print-uris"])).unwrap_or_default();
        let sources = sources(series, &listed)?;
        fs::write(folder.join("sources.list"), sources)?;
        if let Err(error) = quietly("vm-test: package lists", archive.apt("apt-get").args(UPDATE)) {
            if archive.newest(series.packages()).is_err() {
                return Err(error);
            }
            eprintln!("vm-test: using the package lists of an earlier run");
        }
        Ok(archive)
    }

    /// The newest kernel of the series.
    pub(crate) fn kernel(&self) -> Result<Kernel> {
        let Package { name, version, parts } = self.newest(self.series.packages())?;
        eprintln!("vm-test: {name} {version}");
        let roots =
            [name].iter().chain(&parts).map(|name| self.unpacked(name, &version)).collect::<Result<Vec<_>>>()?;
        let image = find_file(&roots, "vmlinuz*").context("the kernel's packages have no vmlinuz")?;
        let busybox = self.newest(&format!("^{BUSYBOX}$"))?;
        let busybox = self.unpacked(&busybox.name, &busybox.version)?;
        let busybox = find_file(&[busybox.join("bin"), busybox.join("usr/bin")], "busybox");
        let busybox = busybox.with_context(|| format!("{BUSYBOX} has no busybox"))?;
        Ok(Kernel { version, image, roots, busybox })
    }

    /// The newest of the packages whose name fits.
    fn newest(&self, pattern: &str) -> Result<Package> {
        let names = output(self.apt("apt-cache").args(["search", "--names-only", pattern])).unwrap_or_default();
        let names: Vec<&str> = names.lines().filter_map(|line| line.split(' ').next()).collect();
        let mut show = self.apt("apt-cache");
        let shown = output(show.args(["show", "--no-all-versions"]).args(&names)).unwrap_or_default();
        newest(&shown).with_context(|| format!("Debian has no package like {pattern}"))
    }

    /// The folder of an unpacked package, fetched if it does not exist.
    fn unpacked(&self, package: &str, version: &str) -> Result<PathBuf> {
        let root = self.folder.join(format!("packages/{package}_{version}"));
        if root.is_dir() {
            return Ok(root);
        }
        let partial = self.folder.join("packages/partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        let mut download = self.apt("apt-get");
        download.args(["download", &format!("{package}={version}")]).current_dir(&partial);
        quietly("vm-test: package", &mut download)?;
        let package = find_file(std::slice::from_ref(&partial), "*.deb").context("apt-get downloaded nothing")?;
        quietly("vm-test: unpack", command("dpkg-deb").arg("--extract").arg(&package).arg(&partial))?;
        fs::remove_file(package)?;
        // A rename is atomic: an existing folder is complete.
        fs::rename(&partial, &root)?;
        Ok(root)
    }

    /// One of apt's programs with its own lists and sources; system settings such as a proxy still apply.
    fn apt(&self, program: &str) -> Command {
        let mut apt = command(program);
        let mut option = |name: &str, value: &Path| {
            apt.arg("-o").arg(format!("{name}={}", value.display()));
        };
        option("Dir::Etc::SourceList", &self.folder.join("sources.list"));
        option("Dir::Etc::SourceParts", Path::new("/dev/null"));
        option("Dir::State::Lists", &self.folder.join("lists"));
        option("Dir::State::Status", Path::new("/dev/null"));
        option("Dir::Cache", &self.folder.join("cache"));
        // Only what apt-cache needs.
        option("Acquire::Languages", Path::new("none"));
        option("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", Path::new("false"));
        // apt's own user may not write here.
        option("APT::Sandbox::User", Path::new("root"));
        apt
    }
}

/// One-line sources of a series, from this machine's sources as `apt-get update --print-uris` prints them.
fn sources(series: Series, listed: &str) -> Result<String> {
    let archives: Vec<&str> =
        listed.lines().filter_map(|line| line.trim_start_matches('\'').split("/dists/").next()).collect();
    let of = |ending: &str| archives.iter().find(|uri| uri.ends_with(ending)).copied();
    let Some(main) = of("/debian") else {
        bail!("apt has no source whose address ends with /debian, from which the kernels would come");
    };
    // Mirrors have both next to each other.
    let security = of("/debian-security").map_or_else(|| format!("{main}-security"), str::to_owned);
    let mut sources = String::new();
    let main = series.suites().iter().map(|suite| (main, suite));
    for (uri, suite) in main.chain(series.security_suite().iter().map(|suite| (&*security, suite))) {
        sources.push_str(&format!("deb [arch=amd64 signed-by={KEYRING}] {uri} {suite} main\n"));
    }
    Ok(sources)
}

/// A package as apt describes it.
#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
    /// Further packages of the same version: newer kernels have separate ones for the image and the modules.
    parts: Vec<String>,
}

impl Package {
    /// Parses a paragraph of `apt-cache show`.
    fn parse(paragraph: &str) -> Option<Self> {
        let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let depends = field("Depends").unwrap_or_default().split(", ").filter_map(|depends| depends.split(' ').next());
        let parts =
            depends.filter(|name| ["linux-binary-", "linux-modules-"].iter().any(|part| name.starts_with(part)));
        Some(Self {
            name: field("Package")?.to_owned(),
            version: field("Version")?.to_owned(),
            parts: parts.map(str::to_owned).collect(),
        })
    }
}

/// The newest of the packages that `apt-cache show` printed.
fn newest(shown: &str) -> Option<Package> {
    shown.split("\n\n").filter_map(Package::parse).max_by_key(|package| numbers(&package.version))
}

/// The numbers of a version, which suffice to compare kernels: they have no epochs.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// A file below these folders whose name matches the shell pattern. Ignores folders that do not exist.
pub(crate) fn find_file(folders: &[PathBuf], name: &str) -> Option<PathBuf> {
    let folders = folders.iter().filter(|folder| folder.is_dir());
    let found = output(command("find").args(folders).args(["-type", "f", "-name", name]))?;
    found.lines().next().map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_use_the_machines_mirror() {
        let listed = "'http://other.example/apt/dists/any/InRelease' a 0 \n\
                      'http://mirror.example/debian/dists/bookworm/InRelease' b 0 \n\
                      'http://mirror.example/debian-security/dists/bookworm-security/InRelease' c 0 \n";
        let lines = sources(Series::Bookworm, listed).unwrap();
        let fields: Vec<(&str, &str)> = lines
            .lines()
            .map(|line| line.split_once("] ").unwrap().1.strip_suffix(" main").unwrap().split_once(' ').unwrap())
            .collect();
        let expected = [
            ("http://mirror.example/debian", "bookworm"),
            ("http://mirror.example/debian", "bookworm-updates"),
            ("http://mirror.example/debian-security", "bookworm-security"),
        ];
        assert_eq!(fields, expected);
        assert!(sources(Series::Newest, "'http://other.example/apt/dists/any/InRelease' a 0 \n").is_err());
    }

    #[test]
    fn newest_version_is_found_by_number() {
        let shown = "Package: linux-image-6.1.0-9-cloud-amd64\nVersion: 6.1.27-1\n\n\
                     Package: linux-image-6.1.0-56-cloud-amd64\nInstalled-Size: 1\nVersion: 6.1.187-1\n\n\
                     Package: linux-image-6.1.0-50-cloud-amd64\nVersion: 6.1.176-1\n";
        let newest_of = |shown| newest(shown).map(|package| package.name);
        assert_eq!(newest_of(shown).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest_of(""), None);
    }

    #[test]
    fn kernel_in_parts_names_its_packages() {
        let shown = "Package: linux-image-7.3.4-cloud-amd64\nVersion: 7.3.4-1\nDepends: dracut | initramfs-tools (>= 0.120), \
                     linux-base-7.3.4-cloud-amd64 (= 7.3.4-1), linux-binary-7.3.4-cloud-amd64 (= 7.3.4-1), \
                     linux-modules-7.3.4-cloud-amd64 (= 7.3.4-1)\n";
        let parts = newest(shown).unwrap().parts;
        assert_eq!(parts, ["linux-binary-7.3.4-cloud-amd64", "linux-modules-7.3.4-cloud-amd64"]);
    }
}
