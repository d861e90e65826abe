//! `cargo xtask book`: builds docs/ as a book into target/book/html with mdBook, and checks every link of the result.
//!
//! mdBook takes only what is in its source folder, and the documents link to files all over the repository. So the pages that
//! docs/SUMMARY.md lists and the files that they link to are copied into target/book/src first, with the same paths.

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    command::{command, output, root, run},
    lint::links::links,
    setup,
};

pub(crate) const SUMMARY: &str = "docs/SUMMARY.md";
const SETTINGS: &str = "docs/book.toml";
const BOOK: &str = "target/book";

pub(crate) fn main() -> Result<()> {
    let mdbook = setup::book_needs()?;
    let book = root().join(BOOK);
    // Pages and files of an earlier book.
    let _ = fs::remove_dir_all(&book);
    copy_sources(&book)?;
    run(command(mdbook).arg("build").arg(&book))?;
    let html = book.join("html");
    let broken = broken_links(&html)?;
    for link in &broken {
        eprintln!("{link}");
    }
    if !broken.is_empty() {
        bail!("{} links of the book lead nowhere", broken.len());
    }
    println!("{BOOK}/html/index.html");
    Ok(())
}

/// The pages that the summary lists, relative to the root.
pub(crate) fn pages(summary: &str) -> Vec<String> {
    summary.lines().flat_map(links).map(|(_, target)| resolved(SUMMARY, target)).collect()
}

/// The target of a link in `page`, relative to the root, without a heading.
fn resolved(page: &str, target: &str) -> String {
    let folder = Path::new(page).parent().unwrap_or(Path::new(""));
    let path = target.split('#').next().unwrap_or_default();
    let mut parts: Vec<Component<'_>> = folder.components().collect();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => drop(parts.pop()),
            Component::CurDir => {}
            part => parts.push(part),
        }
    }
    parts.iter().collect::<PathBuf>().to_string_lossy().into_owned()
}

fn copy_sources(book: &Path) -> Result<()> {
    let read = |file: &str| fs::read_to_string(root().join(file)).with_context(|| format!("reading {file}"));
    let write = |file: &str, text: &[u8]| {
        let path = book.join(file);
        fs::create_dir_all(path.parent().expect("a file is in a folder"))?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    let summary = read(SUMMARY)?;
    let pages = pages(&summary);
    let mut linked = BTreeSet::new();
    for page in &pages {
        let text = read(page)?;
        let targets = text.lines().flat_map(links).map(|(_, target)| target);
        let elsewhere = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
        linked.extend(elsewhere.map(|target| resolved(page, target)));
        write(&format!("src/{page}"), for_mdbook(&text).as_bytes())?;
    }
    let mut text = summary.clone();
    for (_, target) in summary.lines().flat_map(links) {
        text = text.replace(&format!("]({target})"), &format!("]({})", resolved(SUMMARY, target)));
    }
    write("src/SUMMARY.md", text.as_bytes())?;
    write("book.toml", read(SETTINGS)?.as_bytes())?;

    // A folder gets a list of its files, unless it has a page that serves as one. Files of its folders are left out.
    for folder in linked.clone().iter().filter(|target| root().join(target).is_dir()) {
        if pages.contains(&format!("{folder}/README.md")) {
            continue;
        }
        let tracked =
            output(command("git").args(["ls-files", folder])).context("listing the tracked files with git")?;
        let names = |file: &str| Some(file.strip_prefix(folder)?.strip_prefix('/')?.to_owned());
        let names: Vec<String> = tracked.lines().filter_map(names).filter(|name| !name.contains('/')).collect();
        write(&format!("src/{folder}/index.html"), list(folder, &names).as_bytes())?;
        linked.extend(names.iter().map(|name| format!("{folder}/{name}")));
    }
    for file in linked.iter().filter(|file| !pages.contains(file) && root().join(file).is_file()) {
        write(&format!("src/{file}"), &fs::read(root().join(file)).with_context(|| format!("reading {file}"))?)?;
    }
    Ok(())
}

/// The page with links to README.md as mdBook needs them: it makes index.html of that file, and does not change the links.
fn for_mdbook(page: &str) -> String {
    let mut text = page.to_owned();
    for (_, target) in page.lines().flat_map(links) {
        let path = target.split('#').next().unwrap_or_default();
        if !path.contains("://") && Path::new(path).ends_with("README.md") {
            text =
                text.replace(&format!("]({target})"), &format!("]({})", target.replacen("README.md", "index.html", 1)));
        }
    }
    text
}

/// A page with links to these files of the folder.
fn list(folder: &str, names: &[String]) -> String {
    let rows: String = names.iter().map(|name| format!("<li><a href=\"{name}\">{name}</a></li>\n")).collect();
    format!("<!DOCTYPE html>\n<meta charset=\"utf-8\"><title>{folder}</title>\n<h1>{folder}</h1>\n<ul>\n{rows}</ul>\n")
}

/// The links in the HTML files below this folder whose file, or heading in it, does not exist.
fn broken_links(html: &Path) -> Result<Vec<String>> {
    let mut folders = vec![html.to_path_buf()];
    let mut broken = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            // 404.html is served at any path.
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "html") && !path.ends_with("404.html") {
                let text = fs::read_to_string(&path)?;
                let wrong = targets(&text).filter(|target| !leads_somewhere(&path, &text, target));
                broken.extend(wrong.map(|target| format!("{}: {target}", path.display())));
            }
        }
    }
    Ok(broken)
}

fn targets(html: &str) -> impl Iterator<Item = &str> {
    ["href=\"", "src=\""]
        .into_iter()
        .flat_map(|start| html.split(start).skip(1))
        .filter_map(|rest| rest.split('"').next())
        .filter(|target| !["://", "mailto:", "data:"].iter().any(|other| target.contains(other)))
}

fn leads_somewhere(page: &Path, text: &str, target: &str) -> bool {
    let (path, heading) = target.split_once('#').unwrap_or((target, ""));
    let has = |html: &str| heading.is_empty() || html.contains(&format!("id=\"{heading}\""));
    if path.is_empty() {
        return has(text);
    }
    let mut file = page.with_file_name(path);
    if file.is_dir() {
        file.push("index.html");
    }
    let html = file.extension().is_some_and(|end| end == "html");
    if html { fs::read_to_string(&file).is_ok_and(|html| has(&html)) } else { file.exists() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_from_the_page_that_has_them() {
        assert_eq!(resolved("docs/a.md", "../tests/x.rs#L1"), "tests/x.rs");
        assert_eq!(resolved("docs/decisions/0001.md", "../a.md#b"), "docs/a.md");
        assert_eq!(resolved("README.md", "docs/decisions/"), "docs/decisions");
    }

    #[test]
    fn links_to_readmes_lead_to_what_mdbook_makes_of_them() {
        let page = "README.md: [a](README.md) [b](../x/README.md#c) [d](https://e.example/README.md)";
        let expected = "README.md: [a](index.html) [b](../x/index.html#c) [d](https://e.example/README.md)";
        assert_eq!(for_mdbook(page), expected);
    }

    #[test]
    fn links_of_the_book_that_lead_nowhere_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("f")).expect("a folder");
        let page = "<h1 id=\"here\"></h1><a href=\"#here\"><a href=\"b.html#there\"><img src=\"p.svg\"><a href=\"f/\">\
                    <a href=\"https://c.example/none\">";
        fs::write(folder.path().join("a.html"), page).expect("a file");
        fs::write(folder.path().join("b.html"), "<h2 id=\"there\">").expect("a file");
        fs::write(folder.path().join("p.svg"), "").expect("a file");
        fs::write(folder.path().join("f/index.html"), "<a href=\"../a.html#nowhere\">").expect("a file");
        let broken = broken_links(folder.path()).expect("the files can be read");
        assert_eq!(broken.len(), 1, "{broken:?}");
        assert!(broken[0].ends_with("../a.html#nowhere"), "{broken:?}");
        fs::remove_file(folder.path().join("p.svg")).expect("a file");
        assert_eq!(broken_links(folder.path()).expect("the files can be read").len(), 2);
    }
}
