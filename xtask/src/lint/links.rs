//! Checks that the targets of links in documents exist. If a link's text is a name in backticks and its target a Rust file, that
//! file must define a function or module of this name, so that a table of features cannot outlive its tests.

use std::{fs, path::Path};

/// Adds the findings in the document `file` (relative to `root`) with this text. Ignores links to other hosts and to headings.
pub(super) fn check(root: &Path, file: &str, text: &str, findings: &mut Vec<String>) {
    let folder = root.join(file).parent().map(Path::to_path_buf).unwrap_or_default();
    for (line, number) in text.lines().zip(1..) {
        for (name, target) in links(line) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            let fault = match fs::read_to_string(folder.join(path)) {
                Ok(code) if path.ends_with(".rs") => missing(name, &code),
                Ok(_) => None,
                Err(_) if folder.join(path).is_dir() => None,
                Err(_) => Some("does not exist".to_owned()),
            };
            findings.extend(fault.map(|fault| format!("{file}:{number}: {target} {fault}")));
        }
    }
}

/// The texts and targets of the links on a line.
fn links(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.match_indices("](").filter_map(|(at, _)| {
        let name = &line[line[..at].rfind('[')? + 1..at];
        let target = &line[at + 2..];
        Some((name, &target[..target.find(')')?]))
    })
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

    #[test]
    fn links_to_missing_targets_are_found() {
        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir(root.path().join("docs")).expect("a folder");
        fs::write(root.path().join("a.rs"), "#[test]\nfn one() {}\nmod two;\n").expect("a file");
        let text = "[`one`](../a.rs) [`x::two`](../a.rs), [b](../a.rs#L1), [c](#d), [e](https://f.example)\n\
                    [`on`](../a.rs)\n[`three`](../a.rs)\n[g](h.md)\n";
        let mut findings = Vec::new();
        check(root.path(), "docs/t.md", text, &mut findings);
        let expected = [
            "docs/t.md:2: ../a.rs has no `on`",
            "docs/t.md:3: ../a.rs has no `three`",
            "docs/t.md:4: h.md does not exist",
        ];
        assert_eq!(findings, expected);
    }
}
