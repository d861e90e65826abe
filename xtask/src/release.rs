//! `cargo xtask release VERSION`: prepares the commit of a release.
//!
//! Takes the new version. Requires a clean tree, a version that was not released yet, and entries under Unreleased in CHANGELOG.md.
//! Edits Cargo.toml, Cargo.lock, CHANGELOG.md and the image tags in deploy/, then prints the git commands; it never commits or
//! tags. With `--dry-run` it prints the edits and writes nothing.

use std::{fmt, fs, str::FromStr};

use anyhow::{Context as _, Result, bail, ensure};

use crate::command::{cargo, command, output, root, run};

const MANIFEST: &str = "Cargo.toml";
const CHANGELOG: &str = "CHANGELOG.md";
const UNRELEASED: &str = "\n## [Unreleased]\n";
/// Files that name the version: in the tag of the container image, in a label, or as the chart's.
const TAGGED: [&str; 5] = [
    "deploy/Dockerfile",
    "deploy/README.md",
    "deploy/helm/penstock/Chart.yaml",
    "deploy/kubernetes/penstock.yaml",
    "deploy/kubernetes/penstock-host-network.yaml",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The new version, MAJOR.MINOR.PATCH
    #[arg(value_name = "VERSION")]
    new: Version,
    /// Print the edits and write nothing
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let version = args.new;
    let tag = format!("v{version}");
    let status = output(command("git").args(["status", "--porcelain"])).context("`git status` failed")?;
    ensure!(status.is_empty(), "the tree is not clean, commit or stash first:\n{status}");
    let tags = output(command("git").args(["tag", "--list", &tag])).context("`git tag` failed")?;
    ensure!(tags.is_empty(), "the tag {tag} exists");
    let date = output(command("date").args(["-u", "+%F"])).context("`date` failed")?;

    let edits = edits(version, &date)?;
    for edit in &edits {
        print!("{}", edit.difference());
        if !args.dry_run {
            fs::write(root().join(edit.file), &edit.after).with_context(|| format!("writing {}", edit.file))?;
        }
    }
    if args.dry_run {
        println!("Cargo.lock: updated by `cargo update --workspace --offline`");
        println!("dry run: nothing was written; without --dry-run, continue with");
    } else {
        run(cargo().args(["update", "--workspace", "--offline"])).context("Cargo.lock is not updated")?;
        println!("Check the edits with `git diff`, then run");
    }
    println!("  git commit --all --message 'Release {version}'");
    println!("  git tag --annotate {tag} --message 'Penstock {version}'");
    println!("  git push origin HEAD {tag}");
    Ok(())
}

/// A version without pre-release and build parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version {
    major: u64,
    minor: u64,
    patch: u64,
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |part: &str| {
            let is_canonical = part == "0" || !part.starts_with('0');
            let is_number = part.bytes().all(|byte| byte.is_ascii_digit());
            if is_canonical && is_number { part.parse::<u64>().ok() } else { None }
        };
        let numbers: Option<Vec<u64>> = text.split('.').map(number).collect();
        match numbers.as_deref() {
            Some(&[major, minor, patch]) => Ok(Self { major, minor, patch }),
            _ => bail!("`{text}` is not a version: expected MAJOR.MINOR.PATCH, such as 0.2.0"),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

struct Edit {
    file: &'static str,
    before: String,
    after: String,
}

impl Edit {
    /// The file's name, then its removed and added lines between the first and the last line that differ.
    fn difference(&self) -> String {
        let (before, after): (Vec<&str>, Vec<&str>) = (self.before.lines().collect(), self.after.lines().collect());
        let shorter = before.len().min(after.len());
        let head = before.iter().zip(&after).take_while(|(before, after)| before == after).count();
        let tail = before.iter().rev().zip(after.iter().rev()).take_while(|(before, after)| before == after).count();
        let tail = tail.min(shorter - head);
        let mut text = format!("{}:\n", self.file);
        for line in &before[head..before.len() - tail] {
            text.push_str(&format!("  - {line}\n"));
        }
        for line in &after[head..after.len() - tail] {
            text.push_str(&format!("  + {line}\n"));
        }
        text
    }
}

fn edits(version: Version, date: &str) -> Result<Vec<Edit>> {
    let read = |file: &str| fs::read_to_string(root().join(file)).with_context(|| format!("reading {file}"));
    let (manifest, changelog) = (read(MANIFEST)?, read(CHANGELOG)?);
    let present = present_version(&manifest)?;
    check_order(present, version, &changelog)?;
    let mut edits = vec![
        Edit { file: MANIFEST, after: with_version(&manifest, present, version)?, before: manifest },
        Edit { file: CHANGELOG, after: with_release(&changelog, version, date)?, before: changelog },
    ];
    for file in TAGGED {
        let before = read(file)?;
        let after = with_tag(&before, present, version).context(file)?;
        edits.push(Edit { file, before, after });
    }
    edits.retain(|edit| edit.before != edit.after);
    Ok(edits)
}

/// The workspace's version in Cargo.toml.
fn present_version(manifest: &str) -> Result<Version> {
    let manifest: toml::Table = toml::from_str(manifest).context(MANIFEST)?;
    let package = manifest.get("workspace").and_then(|workspace| workspace.get("package"));
    let version = package.and_then(|package| package.get("version")).and_then(toml::Value::as_str);
    version.context("Cargo.toml: workspace.package has no version")?.parse()
}

/// The new version is greater than the present one, or equal to it if the present one was never released.
fn check_order(present: Version, new: Version, changelog: &str) -> Result<()> {
    let heading = format!("## [{new}]");
    ensure!(!changelog.lines().any(|line| line.starts_with(&heading)), "{CHANGELOG}: {new} was released already");
    ensure!(new >= present, "{new} is less than the present version {present}");
    Ok(())
}

fn with_version(manifest: &str, from: Version, to: Version) -> Result<String> {
    let section = manifest.find("[workspace.package]\n").context("Cargo.toml: [workspace.package] is missing")?;
    let (head, tail) = manifest.split_at(section);
    let line = format!("\nversion = \"{from}\"\n");
    ensure!(tail.contains(&line), "Cargo.toml: [workspace.package] has no line `{}`", line.trim());
    Ok(format!("{head}{}", tail.replacen(&line, &format!("\nversion = \"{to}\"\n"), 1)))
}

/// The entries under Unreleased get a heading with version and date; Unreleased stays above it, empty.
fn with_release(changelog: &str, version: Version, date: &str) -> Result<String> {
    let heading = UNRELEASED.trim();
    let at = changelog.find(UNRELEASED).with_context(|| format!("{CHANGELOG}: the heading `{heading}` is missing"))?;
    let (head, section) = changelog.split_at(at + UNRELEASED.len());
    let has_entries = section.lines().take_while(|line| !line.starts_with("## ")).any(|line| line.starts_with("- "));
    ensure!(has_entries, "{CHANGELOG}: `{heading}` has no entries");
    Ok(format!("{head}\n## [{version}] - {date}\n{section}"))
}

fn with_tag(text: &str, from: Version, to: Version) -> Result<String> {
    let places = |version| {
        [
            format!("penstock:{version}"),
            format!("/version: \"{version}\""),
            format!("\nversion: {version}\n"),
            format!("\nappVersion: \"{version}\""),
        ]
    };
    ensure!(
        places(from).iter().any(|place| text.contains(place)),
        "the version {from} is not named as `penstock:{from}`, in a label or as a chart's"
    );
    Ok(places(from).iter().zip(places(to)).fold(text.to_owned(), |text, (from, to)| text.replace(from, &to)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST_TEXT: &str = "[workspace]\nmembers = []\n\n[workspace.package]\nversion = \"0.9.0\"\n\n[dependencies]\nversion = \"0.9.0\"\n";
    const CHANGELOG_TEXT: &str =
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A path.\n\n## [0.9.0] - 2026-01-02\n\n- The first.\n";

    fn version(text: &str) -> Version {
        text.parse().expect("a version")
    }

    #[test]
    fn version_with_three_numbers_is_parsed() {
        assert_eq!(version("0.10.2"), Version { major: 0, minor: 10, patch: 2 });
        assert_eq!(version("0.10.2").to_string(), "0.10.2");
        assert!(version("0.10.0") > version("0.9.9"));
        assert!(version("1.0.0") > version("0.99.99"));
    }

    #[test]
    fn version_in_another_form_is_refused() {
        for text in ["", "1", "1.2", "1.2.3.4", "v1.2.3", "1.2.03", "1.2.-3", "1.2.+3", "1.2.3-rc.1", "1.2.3+a", "1..2"]
        {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn version_that_is_not_next_is_refused() {
        let check = |new: &str| check_order(version("0.9.0"), version(new), CHANGELOG_TEXT).is_ok();
        assert!(check("0.9.1") && check("0.10.0"));
        assert!(!check("0.8.9") && !check("0.9.0"));
    }

    #[test]
    fn present_version_is_released_if_changelog_has_no_section_for_it() {
        let unreleased = "# Changelog\n\n## [Unreleased]\n\n- The first.\n";
        assert!(check_order(version("0.9.0"), version("0.9.0"), unreleased).is_ok());
    }

    #[test]
    fn manifest_edit_changes_the_version_of_the_workspace_only() {
        assert_eq!(present_version(MANIFEST_TEXT).expect("a version"), version("0.9.0"));
        let after = with_version(MANIFEST_TEXT, version("0.9.0"), version("1.0.0")).expect("an edit");
        assert_eq!(present_version(&after).expect("a version"), version("1.0.0"));
        assert!(after.ends_with("[dependencies]\nversion = \"0.9.0\"\n"));
        assert!(with_version(MANIFEST_TEXT, version("0.8.0"), version("1.0.0")).is_err());
    }

    #[test]
    fn changelog_edit_dates_the_unreleased_entries() {
        let after = with_release(CHANGELOG_TEXT, version("1.0.0"), "2026-03-04").expect("an edit");
        let expected = "# Changelog\n\n## [Unreleased]\n\n## [1.0.0] - 2026-03-04\n\n### Added\n\n- A path.\n\n## [0.9.0] - 2026-01-02\n\n- The first.\n";
        assert_eq!(after, expected);
    }

    #[test]
    fn changelog_without_unreleased_entries_is_refused() {
        for text in ["# Changelog\n", "# Changelog\n\n## [Unreleased]\n\n## [0.9.0] - 2026-01-02\n\n- The first.\n"] {
            assert!(with_release(text, version("1.0.0"), "2026-03-04").is_err(), "{text}");
        }
    }

    #[test]
    fn image_tags_are_replaced_and_required() {
        let after = with_tag("image: penstock:0.9.0\n", version("0.9.0"), version("1.0.0")).expect("an edit");
        assert_eq!(after, "image: penstock:1.0.0\n");
        assert!(with_tag("image: other:0.9.0\n", version("0.9.0"), version("1.0.0")).is_err());
    }

    #[test]
    fn difference_names_changed_lines_only() {
        let edit = |before: &str, after: &str| Edit { file: "f", before: before.to_owned(), after: after.to_owned() };
        assert_eq!(edit("a\nb\nc\n", "a\nx\nc\n").difference(), "f:\n  - b\n  + x\n");
        assert_eq!(edit("a\na\n", "a\na\na\n").difference(), "f:\n  + a\n");
    }

    #[test]
    fn files_of_the_repository_can_be_edited() {
        let read = |file: &str| fs::read_to_string(root().join(file)).expect(file);
        let (manifest, next) = (read(MANIFEST), Version { major: u64::MAX, minor: 0, patch: 0 });
        let present = present_version(&manifest).expect("a version");
        assert!(with_version(&manifest, present, next).is_ok());
        assert!(TAGGED.iter().all(|file| with_tag(&read(file), present, next).is_ok()));
        // Empty after a release, so entries are not required here.
        assert!(read(CHANGELOG).contains(UNRELEASED));
    }
}
