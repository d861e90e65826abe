//! Phrases that make a reader stop: each with what to write instead. Checked in Rust sources and documents.

/// Split, so that this file does not break its own rule.
const PHRASES: [(&str, &str); 9] = [
    (concat!("end in ", "order"), "`orderly close`: order is of bytes"),
    (concat!("ends in ", "order"), "`is closed orderly`: order is of bytes"),
    (concat!("right ", "behind"), "`directly after`: behind is for positions"),
    (concat!("behind ", "its "), "`after its`: behind is for positions"),
    (concat!("what is ", "no "), "a positive statement: `anything but an array`"),
    (concat!("that is ", "none"), "a positive statement: `is not an address`"),
    (concat!("waits are ", "none"), "a positive statement: `ends at once`"),
    (concat!("has had ", "its time"), "`timed out`"),
    (concat!("goes on ", "beside"), "`runs during`"),
];
/// Output of earlier versions, as it was printed.
const RECORDED: &str = "docs/kernels.md";

pub(super) fn check(file: &str, line: &str) -> Option<String> {
    if file == RECORDED || !(file.ends_with(".rs") || file.ends_with(".md")) {
        return None;
    }
    let line = line.to_lowercase();
    let (phrase, instead) = PHRASES.into_iter().find(|(phrase, _)| line.contains(phrase))?;
    Some(format!("`{phrase}`: write {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phrase_is_found_with_its_replacement() {
        let found = check("a.md", concat!("The connection had an End in ", "order.")).unwrap();
        assert!(found.contains("orderly close"), "{found}");
        assert_eq!(check("a.rs", "// Bytes arrive in order, and the connection ends."), None);
        assert_eq!(check("a.toml", concat!("right ", "behind")), None);
    }
}
