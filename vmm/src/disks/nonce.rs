//! Small files with random names and contents beside disk images: whoever can read one sees the folder that it was made in.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::with_storage;

/// What their names begin with.
const PREFIX: &str = ".godwit-nonce-";

/// Random bytes, as hexadecimal digits, in a name and in the contents.
const DIGITS: usize = 32;

/// What is older has been left behind by a process that was killed.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

/// How many entries of a folder are looked at for leftovers.
const MAX_ENTRIES: usize = 10_000;

/// Name and contents of such a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Nonce {
    name: String,
    contents: String,
}

/// Files that exist until this is dropped.
#[derive(Debug, Default)]
pub(super) struct NonceFiles(Vec<NonceFile>);

#[derive(Debug)]
struct NonceFile(PathBuf);

impl Nonce {
    /// Whether the file that this describes can be read in `folder`; if not, why.
    pub(super) fn find(&self, folder: &Path) -> Result<(), String> {
        // The name comes from a peer: it must not lead elsewhere.
        if !is_nonce_name(&self.name) || !is_digits(&self.contents) {
            return Err("the other host names a file that is none of Godwit's".into());
        }
        let mut contents = String::new();
        let read = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(folder.join(&self.name))
            .and_then(|file| file.take(2 * DIGITS as u64).read_to_string(&mut contents));
        match read {
            Ok(_) if contents == self.contents => Ok(()),
            Ok(_) => Err("has other contents here".into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err("is not there".into()),
            Err(error) => Err(format!("cannot be read: {error}")),
        }
    }
}

impl NonceFiles {
    /// Makes one in `folder`, and removes what killed processes have left there.
    pub(super) fn make(&mut self, folder: &Path) -> io::Result<Nonce> {
        let nonce = Nonce { name: format!("{PREFIX}{}", random_digits()?), contents: random_digits()? };
        let path = folder.join(&nonce.name);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&path)?;
        self.0.push(NonceFile(path));
        file.write_all(nonce.contents.as_bytes())?;
        // Other hosts see what has reached the server.
        file.sync_all()?;
        if let Err(error) = remove_leftovers(folder, &file) {
            tracing::debug!("{}: leftovers were not looked for: {error}", folder.display());
        }
        Ok(nonce)
    }
}

impl Drop for NonceFiles {
    fn drop(&mut self) {
        let files = std::mem::take(&mut self.0);
        if files.is_empty() {
            return;
        }
        if let Err(why) = with_storage(move || drop(files)) {
            tracing::warn!("files beside disk images may be left behind ({PREFIX}…): {why}");
        }
    }
}

impl Drop for NonceFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Removes what is older than [`LEFTOVER_AGE`] by the clock that has just dated `new`: the storage host's, not this one's.
fn remove_leftovers(folder: &Path, new: &File) -> io::Result<()> {
    let now = new.metadata()?.modified()?;
    for entry in fs::read_dir(folder)?.take(MAX_ENTRIES) {
        let entry = entry?;
        if !entry.file_name().to_str().is_some_and(is_nonce_name) {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        let age = metadata.modified().ok().and_then(|modified| now.duration_since(modified).ok());
        if metadata.is_file() && age.is_some_and(|age| age > LEFTOVER_AGE) {
            drop(NonceFile(entry.path()));
        }
    }
    Ok(())
}

fn is_nonce_name(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(is_digits)
}

fn is_digits(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn random_digits() -> io::Result<String> {
    let mut bytes = [0; DIGITS / 2];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_nonce_is_found_where_it_was_made_and_gone_afterwards() {
        let (here, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut files = NonceFiles::default();
        let nonce = files.make(here.path()).unwrap();
        assert_eq!(nonce.find(here.path()), Ok(()));
        assert!(nonce.find(elsewhere.path()).unwrap_err().contains("not there"));
        fs::write(here.path().join(&nonce.name), "something else").unwrap();
        assert!(nonce.find(here.path()).unwrap_err().contains("other contents"));
        drop(files);
        assert_eq!(names(here.path()), Vec::<String>::new());
    }

    #[test]
    fn a_peer_cannot_have_other_files_read() {
        let folder = tempfile::tempdir().unwrap();
        let digits = "0123456789abcdef0123456789abcdef";
        fs::write(folder.path().join("secret"), digits).unwrap();
        fs::create_dir(folder.path().join("inner")).unwrap();
        for name in ["secret", "../secret", ".godwit-nonce-", ".godwit-nonce-/../../secret", ""] {
            let nonce = Nonce { name: name.into(), contents: digits.into() };
            assert!(nonce.find(&folder.path().join("inner")).unwrap_err().contains("none of Godwit's"), "{name}");
        }
        let name = format!("{PREFIX}{digits}");
        std::os::unix::fs::symlink("secret", folder.path().join(&name)).unwrap();
        let nonce = Nonce { name, contents: digits.into() };
        assert!(nonce.find(folder.path()).is_err(), "links are not followed");
    }

    #[test]
    fn only_old_leftovers_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - Duration::from_secs(3700);
        let make = |name: &str, at: SystemTime| {
            File::create(folder.path().join(name)).unwrap().set_modified(at).unwrap();
        };
        let name = |digit: &str| format!("{PREFIX}{}", digit.repeat(DIGITS));
        make(&name("1"), old);
        make(&name("2"), SystemTime::now() - Duration::from_secs(3000));
        make("disk.img", old);
        make(".godwit-nonce-notes", old);
        drop(NonceFiles::default().make(folder.path()).unwrap());
        let mut left = names(folder.path());
        left.sort();
        assert_eq!(left, [name("2"), ".godwit-nonce-notes".into(), "disk.img".into()]);
    }
}
