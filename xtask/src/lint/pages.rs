//! Checks what belongs to docs/ as a whole: the summary lists every page once, the picture is current, and every alert is explained.

use std::{collections::HashMap, fs, path::Path};

use crate::{book, picture};

const ALERTS: &str = "deploy/helm/penstock/files/alerts.yaml";
const OPERATING: &str = "docs/operating.md";

/// Adds the findings. `files` are the tracked files.
pub(super) fn check(root: &Path, files: &[&str], findings: &mut Vec<String>) {
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap_or_default();
    summary(&book::pages(&read(book::SUMMARY)), files, findings);
    if read(picture::FILE) != picture::svg() {
        findings.push(format!("{} is not current: run `cargo xtask picture`", picture::FILE));
    }
    alerts(&read(ALERTS), &read(OPERATING), findings);
}

fn summary(pages: &[String], files: &[&str], findings: &mut Vec<String>) {
    let mut listed: HashMap<&str, usize> = HashMap::new();
    for page in pages {
        *listed.entry(page).or_default() += 1;
    }
    let of_the_book = |file: &&str| file.starts_with("docs/") && file.ends_with(".md") && *file != book::SUMMARY;
    let unlisted = files.iter().copied().filter(of_the_book).filter(|file| !listed.contains_key(file));
    findings.extend(unlisted.map(|file| format!("{file}: {} does not list it", book::SUMMARY)));
    let repeated = listed.iter().filter(|(_, count)| **count > 1);
    findings.extend(repeated.map(|(page, count)| format!("{}: lists {page} {count} times", book::SUMMARY)));
}

fn alerts(rules: &str, operating: &str, findings: &mut Vec<String>) {
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let unexplained = names.filter(|name| !operating.contains(&format!("`{name}`")));
    findings.extend(unexplained.map(|name| format!("{ALERTS}: {OPERATING} does not explain `{name}`")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_the_summary_lacks_or_repeats_are_found() {
        let pages = book::pages("# Summary\n[Start](../README.md)\n- [A](a.md)\n  - [B](b/b.md)\n- [A again](a.md)\n");
        assert_eq!(pages, ["README.md", "docs/a.md", "docs/b/b.md", "docs/a.md"]);
        let mut findings = Vec::new();
        let files = ["README.md", "docs/SUMMARY.md", "docs/a.md", "docs/b/b.md", "docs/c.md", "docs/d.json", "e.md"];
        summary(&pages, &files, &mut findings);
        assert_eq!(
            findings,
            ["docs/c.md: docs/SUMMARY.md does not list it", "docs/SUMMARY.md: lists docs/a.md 2 times"]
        );
    }

    #[test]
    fn unexplained_alert_is_found() {
        let mut findings = Vec::new();
        alerts("    - alert: Known\n      expr: up\n    - alert: New\n", "| `Known` | look |\n", &mut findings);
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].contains("`New`"), "{findings:?}");
    }
}
