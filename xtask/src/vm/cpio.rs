//! Writes the archive format of the kernel's initial file system (Documentation/driver-api/early-userspace/buffer-format.rst,
//! "newc").

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::Path,
};

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_755;

/// Writes an archive and adds the folders of each file. Everything belongs to root and is executable.
pub(crate) struct Cpio<W> {
    to: W,
    folders: BTreeSet<String>,
    inode: u32,
}

impl<W: Write> Cpio<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, folders: BTreeSet::new(), inode: 0 }
    }

    /// `path` is absolute.
    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        let parents: Vec<&Path> = Path::new(path).ancestors().filter(|path| path.parent().is_some()).collect();
        for parent in parents.into_iter().rev() {
            let parent = parent.to_string_lossy().into_owned();
            if self.folders.insert(parent.clone()) {
                self.entry(&parent, FOLDER, &[])?;
            }
        }
        Ok(())
    }

    /// `path` is absolute.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        if let Some(parent) = Path::new(path).parent() {
            self.folder(&parent.to_string_lossy())?;
        }
        self.entry(path, FILE, content)
    }

    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.entry("/TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let name = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{path} is too large")))?;
        // inode, mode, owner, group, links, time, size, four device numbers, length of the name, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        write!(self.to, "070701")?;
        for field in fields {
            write!(self.to, "{field:08x}")?;
        }
        self.to.write_all(name.as_bytes())?;
        self.to.write_all(&[0])?;
        // Name and content are padded to a multiple of four.
        self.pad(6 + 13 * 8 + name.len() + 1)?;
        self.to.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.to.write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_files_are_written_once() {
        let mut archive = Vec::new();
        let mut cpio = Cpio::new(&mut archive);
        cpio.file("/a/b/one", b"12345").unwrap();
        cpio.file("/a/b/two", b"").unwrap();
        cpio.finish().unwrap();
        assert_eq!(archive.len() % 4, 0);

        let mut entries = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            let field = |n: usize| {
                let from = at + 6 + n * 8;
                usize::from_str_radix(std::str::from_utf8(&archive[from..from + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name) = (field(1), field(6), field(11));
            let begin = at + 110;
            let text = String::from_utf8_lossy(&archive[begin..begin + name - 1]).into_owned();
            let content = (begin + name).next_multiple_of(4);
            entries.push((text, mode, archive[content..content + size].to_vec()));
            at = (content + size).next_multiple_of(4);
        }
        let names: Vec<&str> = entries.iter().map(|(name, ..)| &**name).collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "TRAILER!!!"]);
        assert_eq!((entries[0].1, entries[2].1), (FOLDER as usize, FILE as usize));
        assert_eq!(entries[2].2, b"12345");
    }
}
