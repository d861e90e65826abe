//! Finds type names with two meanings. Takes the Rust files of the agent and of the code it shares with the kernel program, without
//! their tests; reports each definition of a name that an earlier file defines, too.

use std::collections::BTreeMap;

const PLACES: [&str; 2] = ["agent/src/", "common/src/"];
const KEYWORDS: [&str; 4] = ["struct ", "enum ", "trait ", "type "];
/// Names that may be defined twice, with the reason.
const SHARED: [(&str, &str); 1] =
    [("KubernetesDiscovery", "one of the two is compiled, depending on the feature `kubernetes`")];

/// Where each name was defined first.
#[derive(Default)]
pub(super) struct TypeNames(BTreeMap<String, String>);

impl TypeNames {
    pub(super) fn check(&mut self, file: &str, text: &str, findings: &mut Vec<String>) {
        let in_tests = file.split('/').any(|part| part == "tests" || part == "tests.rs");
        if in_tests || !PLACES.iter().any(|place| file.starts_with(place)) {
            return;
        }
        for (line, number) in product_code(text) {
            let Some(name) = defined(line).filter(|name| SHARED.iter().all(|(shared, _)| shared != name)) else {
                continue;
            };
            let here = format!("{file}:{number}");
            if let Some(first) = self.0.get(name) {
                findings.push(format!("{here}: the type name `{name}` has another meaning in {first}: rename one"));
            } else {
                self.0.insert(name.to_owned(), here);
            }
        }
    }
}

/// The lines before the module with the file's tests, with their numbers.
fn product_code(text: &str) -> impl Iterator<Item = (&str, usize)> {
    text.lines().zip(1..).take_while(|(line, _)| !line.starts_with("mod tests {"))
}

/// The name of the type that a line defines. Associated types of an `impl` or a trait are none.
fn defined(line: &str) -> Option<&str> {
    let code = line.trim_start();
    let indented = code.len() < line.len();
    let code = match code.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(") ")?.1,
        Some(rest) => rest.strip_prefix(' ')?,
        None => code,
    };
    let keyword = KEYWORDS.into_iter().find(|keyword| code.starts_with(keyword))?;
    if indented && keyword == "type " {
        return None;
    }
    let rest = &code[keyword.len()..];
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    rest.starts_with(|c: char| c.is_ascii_uppercase()).then(|| &rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(files: &[(&str, &str)]) -> Vec<String> {
        let (mut names, mut findings) = (TypeNames::default(), Vec::new());
        for (file, text) in files {
            names.check(file, text, &mut findings);
        }
        findings
    }

    #[test]
    fn second_type_of_a_name_is_found() {
        let first = ("agent/src/a.rs", "pub struct State<'a> {\n");
        for second in
            ["enum State {\n", "pub(super) trait State: Sized {\n", "type State = u8;\n", "    pub struct State;\n"]
        {
            for place in ["agent/src/b.rs", "common/src/b/c.rs"] {
                let expected =
                    format!("{place}:1: the type name `State` has another meaning in agent/src/a.rs:1: rename one");
                assert_eq!(findings(&[first, (place, second)]), [expected], "{second}");
            }
        }
    }

    #[test]
    fn other_names_tests_and_associated_types_are_permitted() {
        let first = ("agent/src/a.rs", "pub struct State {\n");
        let permitted = [
            ("agent/src/b.rs", "struct States;\n// struct State\nfn f(state: State) {}\n"),
            ("agent/src/c.rs", "impl Iterator for C {\n    type State = u8;\n}\n"),
            ("agent/src/d.rs", "#[cfg(test)]\nmod tests {\n    struct State;\n}\n"),
            ("agent/src/e/tests.rs", "struct State;\n"),
            ("agent/src/e/tests/f.rs", "struct State;\n"),
            ("xtask/src/g.rs", "struct State;\n"),
        ];
        for file in permitted {
            assert_eq!(findings(&[first, file]), [""; 0], "{file:?}");
        }
        let shared = SHARED.map(|(name, _)| format!("pub struct {name};\n"));
        assert_eq!(findings(&[("agent/src/a.rs", &shared[0]), ("agent/src/b.rs", &shared[0])]), [""; 0]);
    }
}
