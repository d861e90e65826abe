//! Endpoints in a file that is watched: it is read four times a second and counts when it has changed.
//!
//! Reading needs no knowledge of how files change: a rename, the swap of the link behind a ConfigMap, a write in place and a
//! network's file system are all the same, and what is read is what counts. A change is taken when it was read twice, so that
//! a file that is being written in place is not taken by half.

use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;
use tokio::io::AsyncReadExt as _;

use super::feed::Feed;
use crate::config::{Endpoint, EndpointsError, EndpointsFormat, parse_endpoints};

const LOOK: Duration = Duration::from_millis(250);
/// A file of more bytes is not one of endpoints.
const MAX: u64 = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
enum FileError {
    #[error("there is no such file")]
    Missing,
    #[error("it cannot be read: {0}")]
    Unreadable(String),
    #[error("it has more than {MAX} bytes")]
    TooLarge,
    #[error("it is not text")]
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

type Content = Result<Vec<u8>, FileError>;

/// Runs until it is dropped.
pub(super) async fn follow(path: PathBuf, ports: Vec<u16>, mut feed: Feed) {
    let format = EndpointsFormat::of(&path);
    let mut watch = Watch::default();
    loop {
        if let Some(content) = watch.look(read(&path).await) {
            let endpoints = content.clone().and_then(|content| {
                let text = std::str::from_utf8(&content).map_err(|_| FileError::NotText)?;
                Ok(parse_endpoints(text, format, &ports, feed.listen)?)
            });
            take(endpoints, &path, &mut feed);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn take(endpoints: Result<Vec<Endpoint>, FileError>, path: &std::path::Path, feed: &mut Feed) {
    match endpoints {
        Ok(endpoints) => feed.gives(endpoints),
        Err(error) => feed.fails(error.reason(), &format_args!("{}: {error}", path.display()), true),
    }
}

async fn read(path: &std::path::Path) -> Content {
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

/// Tells changes from what was there before.
#[derive(Debug, Default)]
struct Watch {
    /// What was taken last.
    taken: Option<Content>,
    /// What was read last, when that was something else.
    changing: Option<Content>,
}

impl Watch {
    /// What the file is from now on, if it is something new. The first is new.
    fn look(&mut self, content: Content) -> Option<&Content> {
        if self.taken.as_ref() == Some(&content) {
            self.changing = None;
            return None;
        }
        if self.taken.is_some() && self.changing.as_ref() != Some(&content) {
            self.changing = Some(content);
            return None;
        }
        self.changing = None;
        Some(self.taken.insert(content))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Content {
        Ok(text.into())
    }

    #[test]
    fn the_first_counts_at_once_and_a_change_when_it_stays() {
        let mut watch = Watch::default();
        assert_eq!(watch.look(text("a")), Some(&text("a")));
        assert_eq!(watch.look(text("a")), None);
        assert_eq!(watch.look(text("")), None, "being written");
        assert_eq!(watch.look(text("b")), None);
        assert_eq!(watch.look(text("b")), Some(&text("b")));
        assert_eq!(watch.look(text("b")), None);
    }

    #[test]
    fn back_before_it_counted_is_no_change() {
        let mut watch = Watch::default();
        watch.look(text("a"));
        for content in [text(""), text("a"), text(""), text("a")] {
            assert_eq!(watch.look(content), None);
        }
    }

    #[test]
    fn a_file_that_is_gone_is_a_change_like_any_other() {
        let mut watch = Watch::default();
        let missing = || Err(FileError::Missing);
        assert_eq!(watch.look(missing()), Some(&missing()));
        assert_eq!(watch.look(missing()), None);
        assert_eq!(watch.look(text("a")), None);
        assert_eq!(watch.look(text("a")), Some(&text("a")));
        assert_eq!(watch.look(missing()), None);
        assert_eq!(watch.look(missing()), Some(&missing()));
    }

    #[tokio::test]
    async fn files_are_read_up_to_a_limit() {
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
