//! Finds the files of a configuration that the agent could not read after one started as root has become `process.user`: the
//! configuration itself is read again at SIGHUP, certificates and keys when they are renewed, files of endpoints when they change,
//! the kubeconfig when the agent connects to the API server. Whether that user may read a file is told by owners and mode bits,
//! without ACLs.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::{Gid, Uid};

use super::Trial;
use crate::config::{ClientCertificate, Config, ListenTls, Picker, PoolTls, Process, ServerTls, User};

/// Mode bits of one class.
const READ: u32 = 4;
const ENTER: u32 = 1;

/// The files that the agent could not read if it was started by this user, `file` among them, which has the configuration.
pub fn unreadable(config: &Config, file: &Path) -> Vec<Trial> {
    let becomes = config.process.user.filter(|_| Uid::effective().is_root());
    let name = match becomes {
        Some(User { uid, gid }) => format!("uid {uid}, gid {gid}, the user of `process.user`"),
        None => format!("uid {}, gid {}", Uid::effective(), Gid::effective()),
    };
    let failed = |(setting, file): (String, PathBuf)| {
        let allowed = |()| becomes.map_or(Ok(()), |user| may_read(&file, user, &config.process));
        let error = read(&file).and_then(allowed).err()?;
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "write the file, or correct the setting",
            _ => "let this user read the file and enter its folders, or set `process.user`",
        };
        Some(Trial::failed(setting, format!("{} cannot be read by {name}: {error}", file.display()), advice))
    };
    named(config, file).into_iter().filter_map(failed).collect()
}

/// A folder can be opened, but not read.
fn read(file: &Path) -> io::Result<()> {
    let opened = File::open(file)?;
    if opened.metadata()?.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(()) }
}

/// Fails if the user may not read the file, or not enter a folder on the way to it, also if a part of the path is a symbolic link.
fn may_read(file: &Path, user: User, process: &Process) -> io::Result<()> {
    let denied = |what: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    let allows = |metadata: &Metadata, bit: u32| {
        let is_of_group = metadata.gid() == user.gid || process.groups.contains(&metadata.gid());
        let class = if metadata.uid() == user.uid { 6 } else { 3 * u32::from(is_of_group) };
        metadata.mode() >> class & bit != 0
    };
    let real = file.canonicalize()?;
    for folder in std::path::absolute(file)?.ancestors().skip(1).chain(real.ancestors().skip(1)) {
        if !allows(&fs::metadata(folder)?, ENTER) {
            return denied(format!("folder {} is closed to it", folder.display()));
        }
    }
    let metadata = fs::metadata(real)?;
    if allows(&metadata, READ) {
        return Ok(());
    }
    let (mode, owner, group) = (metadata.mode() & 0o777, metadata.uid(), metadata.gid());
    denied(format!("mode {mode:o}, owner {owner}, group {group}"))
}

/// The files that are read while the agent runs, with their settings.
fn named(config: &Config, file: &Path) -> Vec<(String, PathBuf)> {
    let mut files = Vec::new();
    let mut add = |setting: String, file: &Path| files.push((setting, file.to_owned()));
    add("configuration".to_owned(), file);
    if let Some(file) = &config.kubernetes.kubeconfig {
        add("kubernetes.kubeconfig".to_owned(), file);
    }
    if let Some(ListenTls { cert_file, key_file, client_ca_file, .. }) = &config.listen.tls {
        if let Some(file) = client_ca_file {
            add("listen.tls.client_ca_file".to_owned(), file);
        }
        add("listen.tls.cert_file".to_owned(), cert_file);
        add("listen.tls.key_file".to_owned(), key_file);
    }
    for pool in &config.pools {
        let name = &pool.name;
        if let Some(file) = &pool.endpoints_file {
            add(format!("pool {name}, endpoints_file"), file);
        }
        if let Some(PoolTls { verify, client_certificate, .. }) = &pool.tls {
            if let ServerTls::Ca(file) = verify {
                add(format!("pool {name}, tls.ca_file"), file);
            }
            if let Some(ClientCertificate { certificate, key }) = client_certificate {
                add(format!("pool {name}, tls.client_cert_file"), certificate);
                add(format!("pool {name}, tls.client_key_file"), key);
            }
        }
        let Picker::Epp(epp) = &pool.picker else { continue };
        if let ServerTls::Ca(file) = &epp.tls {
            add(format!("pool {name}, picker.ca_file"), file);
        }
        if let Some(ClientCertificate { certificate, key }) = &epp.client_certificate {
            add(format!("pool {name}, picker.client_cert_file"), certificate);
            add(format!("pool {name}, picker.client_key_file"), key);
        }
    }
    files
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn missing_file_and_folder_are_found_with_their_settings() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("there.toml"), "endpoints = []").unwrap();
        let pool = |name: &str, file: &Path| format!("[[pools]]\nname = {name:?}\nendpoints_file = {file:?}\n");
        let text = pool("a", &path("gone.toml")) + &pool("b", &path("there.toml")) + &pool("c", folder.path());
        let config = Config::parse(&text, "p.toml").unwrap();
        let found: Vec<_> =
            unreadable(&config, &path("there.toml")).into_iter().map(|trial| (trial.name, trial.found)).collect();
        let [(one, gone), (other, is_folder)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((one.as_str(), other.as_str()), ("pool a, endpoints_file", "pool c, endpoints_file"));
        assert!(gone.starts_with(&format!("{} cannot be read by uid ", path("gone.toml").display())), "{gone}");
        assert!(gone.contains(": No such file"), "{gone}");
        assert!(is_folder.ends_with("is a directory"), "{is_folder}");
    }

    #[test]
    fn user_needs_mode_bits_of_file_and_folders() {
        let folder = tempfile::tempdir().unwrap();
        let (inner, file, link) =
            (folder.path().join("inner"), folder.path().join("inner/file"), folder.path().join("link"));
        fs::create_dir(&inner).unwrap();
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let allow = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let own = fs::metadata(&file).unwrap();
        let (uid, gid) = (own.uid() + 1, own.gid() + 1);
        let (owner, member, other) = (User { uid: own.uid(), gid }, User { uid, gid: own.gid() }, User { uid, gid });
        let alone = Process::default();
        let in_group = Process { groups: vec![own.gid()], ..Process::default() };
        for (open, inside, text, user, process, readable) in [
            (0o755, 0o755, 0o644, other, &alone, true),
            (0o755, 0o755, 0o640, other, &alone, false),
            (0o755, 0o755, 0o640, member, &alone, true),
            (0o755, 0o755, 0o640, other, &in_group, true),
            // The bits of the first class that fits count alone.
            (0o755, 0o755, 0o604, member, &alone, false),
            (0o755, 0o755, 0o400, owner, &alone, true),
            (0o755, 0o744, 0o644, other, &alone, false),
            (0o700, 0o755, 0o644, other, &alone, false),
        ] {
            allow(&file, text);
            allow(&inner, inside);
            allow(folder.path(), open);
            for path in [&file, &link] {
                let found = may_read(path, user, process);
                assert_eq!(found.is_ok(), readable, "{open:o} {inside:o} {text:o} {user:?}: {found:?}");
            }
        }
    }

    #[test]
    fn every_file_is_named() {
        let text = "[kubernetes]\nkubeconfig = \"/kc\"\n[listen.tls]\naddress = \"127.0.0.1:1\"\ncert_file = \"/c\"\nkey_file = \"/k\"\n\
             [[pools]]\nname = \"a\"\nendpoints_file = \"/e\"\n[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\n\
             tls = \"ca\"\nca_file = \"/ca\"\nclient_cert_file = \"/cc\"\nclient_key_file = \"/ck\"\n";
        let named = named(&Config::parse(text, "p.toml").unwrap(), Path::new("p.toml"));
        let files: Vec<_> = named.iter().map(|(_, file)| file.to_str().unwrap()).collect();
        assert_eq!(files, ["p.toml", "/kc", "/c", "/k", "/e", "/ca", "/cc", "/ck"]);
    }
}
