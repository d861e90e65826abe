//! Reads a pool's endpoints from a file, four times a second, and feeds them into the set when the content has changed.
//!
//! Polling the content works for every kind of change: renames, the symlink swap of a ConfigMap, writes in place and network file
//! systems. A change is applied after two equal reads, so that a file that is being written in place is not applied half-written.

use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;
use tokio::io::AsyncReadExt as _;

use super::feed::Feed;
use crate::config::{EndpointsError, EndpointsFormat, ListedEndpoint, parse_endpoints};

const READ_INTERVAL: Duration = Duration::from_millis(250);
/// Largest file in bytes.
const MAX: u64 = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
enum FileError {
    #[error("file not found")]
    Missing,
    #[error("cannot be read: {0}")]
    Unreadable(String),
    #[error("larger than {MAX} bytes")]
    TooLarge,
    #[error("not valid UTF-8")]
    NotText,
    #[error("{0}")]
    Wrong(#[from] EndpointsError),
}

impl FileError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unreadable(_) => "unreadable",
            Self::TooLarge => "too_large",
            Self::NotText | Self::Wrong(_) => "wrong",
        }
    }
}

type FileContent = Result<Vec<u8>, FileError>;

/// Follows the file until the future is dropped.
pub(super) async fn follow(path: PathBuf, ports: Vec<u16>, mut feed: Feed) {
    let format = EndpointsFormat::of(&path);
    let mut watch = FileChanges::default();
    loop {
        if let Some(content) = watch.changed(read(&path).await) {
            let endpoints = content.clone().and_then(|content| {
                let text = std::str::from_utf8(&content).map_err(|_| FileError::NotText)?;
                Ok(parse_endpoints(text, format, &ports, feed.listen)?)
            });
            take(endpoints, &path, &mut feed);
        }
        tokio::time::sleep(READ_INTERVAL).await;
    }
}

fn take(endpoints: Result<Vec<ListedEndpoint>, FileError>, path: &std::path::Path, feed: &mut Feed) {
    match endpoints {
        Ok(endpoints) => feed.update(endpoints),
        Err(error) => feed.failed(error.reason(), &format_args!("{}: {error}", path.display()), true),
    }
}

async fn read(path: &std::path::Path) -> FileContent {
    let content = async {
        let file = tokio::fs::File::open(path).await?;
        let mut content = Vec::new();
        file.take(MAX + 1).read_to_end(&mut content).await?;
        Ok(content)
    };
    match content.await {
        Ok(content) if content.len() as u64 > MAX => Err(FileError::TooLarge),
        Ok(content) => Ok(content),
        Err(error) if io::Error::kind(&error) == io::ErrorKind::NotFound => Err(FileError::Missing),
        Err(error) => Err(FileError::Unreadable(error.to_string())),
    }
}

/// Detects changes of the content.
#[derive(Debug, Default)]
struct FileChanges {
    /// The content that was applied last.
    applied: Option<FileContent>,
    /// The content that was read last, if it differs from `applied`.
    changing: Option<FileContent>,
}

impl FileChanges {
    /// Takes what was read. Returns the content if it is to be applied: the first one, or a change that was read twice.
    fn changed(&mut self, content: FileContent) -> Option<&FileContent> {
        if self.applied.as_ref() == Some(&content) {
            self.changing = None;
            return None;
        }
        if self.applied.is_some() && self.changing.as_ref() != Some(&content) {
            self.changing = Some(content);
            return None;
        }
        self.changing = None;
        Some(self.applied.insert(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> FileContent {
        Ok(text.into())
    }

    #[test]
    fn first_content_is_applied_at_once_and_a_change_when_read_twice() {
        let mut watch = FileChanges::default();
        assert_eq!(watch.changed(text("a")), Some(&text("a")));
        assert_eq!(watch.changed(text("a")), None);
        assert_eq!(watch.changed(text("")), None, "being written");
        assert_eq!(watch.changed(text("b")), None);
        assert_eq!(watch.changed(text("b")), Some(&text("b")));
        assert_eq!(watch.changed(text("b")), None);
    }

    #[test]
    fn change_that_is_undone_before_the_second_read_is_ignored() {
        let mut watch = FileChanges::default();
        watch.changed(text("a"));
        for content in [text(""), text("a"), text(""), text("a")] {
            assert_eq!(watch.changed(content), None);
        }
    }

    #[test]
    fn missing_file_is_a_change() {
        let mut watch = FileChanges::default();
        let missing = || Err(FileError::Missing);
        assert_eq!(watch.changed(missing()), Some(&missing()));
        assert_eq!(watch.changed(missing()), None);
        assert_eq!(watch.changed(text("a")), None);
        assert_eq!(watch.changed(text("a")), Some(&text("a")));
        assert_eq!(watch.changed(missing()), None);
        assert_eq!(watch.changed(missing()), Some(&missing()));
    }

    #[tokio::test]
    async fn larger_file_is_rejected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.toml");
        assert_eq!(read(&path).await, Err(FileError::Missing));
        std::fs::write(&path, "endpoints = []").unwrap();
        assert_eq!(read(&path).await, text("endpoints = []"));
        std::fs::File::create(&path).unwrap().set_len(MAX + 1).unwrap();
        assert_eq!(read(&path).await, Err(FileError::TooLarge));
        let folder = read(folder.path()).await.unwrap_err();
        assert_eq!(folder.reason(), "unreadable", "{folder}");
    }
}
