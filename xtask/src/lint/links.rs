//! Checks that the targets of links in documents exist, and the headings in them. If a link's text is a name in backticks and its
//! target a Rust file, that file must define a function or module of this name, so that a table of features cannot outlive its tests.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::Path,
};

/// Adds the findings in the document `file` (relative to `root`) with this text. Ignores links to other hosts.
pub(super) fn check(root: &Path, file: &str, text: &str, findings: &mut Vec<String>) {
    let folder = root.join(file).parent().map(Path::to_path_buf).unwrap_or_default();
    for (line, number) in prose(text) {
        for (name, target) in links(line).filter(|(_, target)| !target.contains("://")) {
            let (path, heading) = target.split_once('#').unwrap_or((target, ""));
            let fault = match fs::read_to_string(folder.join(path)) {
                _ if path.is_empty() => no_heading(heading, text),
                Ok(code) if path.ends_with(".rs") => missing(name, &code),
                Ok(document) if path.ends_with(".md") && !heading.is_empty() => no_heading(heading, &document),
                // Pictures are no text.
                Err(_) if !folder.join(path).exists() => Some("does not exist".to_owned()),
                _ => None,
            };
            findings.extend(fault.map(|fault| format!("{file}:{number}: {target} {fault}")));
        }
    }
}

/// The lines outside of code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (&str, usize)> {
    let mut in_code = false;
    text.lines().zip(1..).filter(move |(line, _)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        !fence && !in_code
    })
}

/// The texts and targets of the links on a line.
pub(crate) fn links(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.match_indices("](").filter_map(|(at, _)| {
        let name = &line[line[..at].rfind('[')? + 1..at];
        let target = &line[at + 2..];
        Some((name, &target[..target.find(')')?]))
    })
}

fn no_heading(heading: &str, document: &str) -> Option<String> {
    (!anchors(document).contains(heading)).then(|| "names a heading that the document does not have".to_owned())
}

/// The names by which links find the headings, as forges and mdBook make them.
fn anchors(document: &str) -> HashSet<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let headings = prose(document).filter_map(|(line, _)| {
        let heading = line.trim_start_matches('#');
        (heading.len() < line.len()).then(|| heading.strip_prefix(' ')).flatten()
    });
    headings
        .map(|heading| {
            let name: String = heading
                .trim()
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || "_- ".contains(*c))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect();
            let count = seen.entry(name.clone()).or_default();
            *count += 1;
            if *count == 1 { name } else { format!("{name}-{}", *count - 1) }
        })
        .collect()
}

fn missing(name: &str, code: &str) -> Option<String> {
    let name = name.strip_prefix('`')?.strip_suffix('`')?;
    let last = name.rsplit("::").next().unwrap_or(name);
    let is_name = !last.is_empty() && last.chars().all(|c| c.is_alphanumeric() || c == '_');
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
    let defined = ["fn ", "mod "].into_iter().any(|keyword| {
        let definition = format!("{keyword}{last}");
        code.match_indices(&definition).any(|(at, _)| ends(&code[at + definition.len()..]))
    });
    (is_name && !defined).then(|| format!("has no `{last}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(documents: &[(&str, &str)], file: &str) -> Vec<String> {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("docs")).expect("a folder");
        for (path, text) in documents {
            fs::write(root.path().join(path), text).expect("a file");
        }
        let mut findings = Vec::new();
        let text = fs::read_to_string(root.path().join(file)).expect("a document");
        check(root.path(), file, &text, &mut findings);
        findings
    }

    #[test]
    fn links_to_missing_targets_are_found() {
        let text = "[`one`](../a.rs) [`x::two`](../a.rs), [b](../a.rs#L1), [e](https://f.example)\n\
                    [`on`](../a.rs)\n[`three`](../a.rs)\n[g](h.md)\n[folder](../docs/)\n```\n[code](none.md)\n```\n";
        let found = findings(&[("a.rs", "#[test]\nfn one() {}\nmod two;\n"), ("docs/t.md", text)], "docs/t.md");
        let expected = [
            "docs/t.md:2: ../a.rs has no `on`",
            "docs/t.md:3: ../a.rs has no `three`",
            "docs/t.md:4: h.md does not exist",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn links_to_missing_headings_are_found() {
        let other = "# Path `local`, and others\n## Twice\n## Twice\n```\n# code\n```\n#no-space\n";
        let text = "# Here\n[a](#here) [b](o.md#path-local-and-others) [c](o.md#twice) [d](o.md#twice-1)\n\
                    [e](#there)\n[f](o.md#code)\n[g](o.md#twice-2)\n[h](o.md#no-space)\n";
        let found = findings(&[("docs/o.md", other), ("docs/t.md", text)], "docs/t.md");
        let lines: Vec<&str> = found.iter().filter_map(|finding| finding.split(' ').nth(1)).collect();
        assert_eq!(lines, ["#there", "o.md#code", "o.md#twice-2", "o.md#no-space"], "{found:?}");
    }
}
