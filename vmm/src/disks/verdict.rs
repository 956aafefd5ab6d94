//! The destination's side: whether what it is to open as disks are the source's, and whether it can use them.

use std::fs;
use std::io;
use std::path::Path;

use godwit_core::{Refusal, codec};

use super::nonce::NonceFiles;
use super::{AskedDisk, Evidence, Identity, Mark, Question, locks, with_storage};
use crate::config::{DiskConfig, MachineConfig};
use crate::devices::virtio::block::{CacheMode, open_file};

/// What a destination thinks of a machine's disks. The files that it has made are removed when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct DiskVerdict {
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) warnings: Vec<String>,
    pub(crate) evidence: Vec<u8>,
    _files: NonceFiles,
}

impl DiskVerdict {
    /// Looks at the disks of a machine; `config` is as it holds here, and says whether this host's page cache is used.
    pub(crate) fn new(config: &MachineConfig, question: &[u8]) -> Self {
        if config.disks.is_empty() {
            return Self { evidence: codec::encode(&Evidence::default()).unwrap_or_default(), ..Self::default() };
        }
        let unusable = |why| Self::refused(vec![Refusal::new("disk", why)]);
        let question: Question = match codec::decode(question) {
            Ok(question) => question,
            Err(error) => return unusable(format!("cannot read what the source says of its disks: {error}")),
        };
        let (disks, unsafe_cache) = (config.disks.clone(), config.unsafe_cache);
        with_storage(move || Self::look(&disks, unsafe_cache, &question)).unwrap_or_else(unusable)
    }

    /// None of the disks can be used.
    pub(crate) fn refused(refusals: Vec<Refusal>) -> Self {
        Self { refusals, ..Self::default() }
    }

    fn look(disks: &[DiskConfig], unsafe_cache: bool, question: &Question) -> Self {
        let (mut verdict, mut evidence) = (Self::default(), Evidence::default());
        if question.unsafe_cache && !unsafe_cache {
            verdict.refusals.push(Refusal::new(
                "disk",
                "the source accesses its disks through the page cache (--unsafe-cache); if this host is to do so, too, start \
                 the receiver with --unsafe-cache",
            ));
        }
        if unsafe_cache {
            verdict.warnings.push(
                "disks go through the page cache here (--unsafe-cache): what it holds of the images is dropped before the \
                 machine runs, but a host that is still writing them is not noticed"
                    .into(),
            );
        }
        for disk in disks {
            match look_at(disk, CacheMode::of(unsafe_cache), question, &mut verdict._files) {
                Ok((nonce, warning)) => {
                    evidence.disks.extend(nonce.map(|nonce| (disk.id.clone(), nonce)));
                    verdict.warnings.extend(warning);
                }
                Err(reason) => verdict.refusals.push(Refusal::new(format!("disk {}", disk.id), reason)),
            }
        }
        match codec::encode(&evidence) {
            Ok(bytes) => verdict.evidence = bytes,
            Err(error) => verdict.refusals.push(Refusal::new("disk", error.to_string())),
        }
        verdict
    }
}

/// Whether this is the source's disk, and usable; the mark that has been made for it if it is written, and what to warn of.
fn look_at(
    disk: &DiskConfig,
    cache: CacheMode,
    question: &Question,
    files: &mut NonceFiles,
) -> Result<(Option<super::Nonce>, Option<String>), String> {
    let asked = question.disks.iter().find(|asked| asked.id == disk.id);
    let AskedDisk { seen, locked, .. } = asked.ok_or("the source says nothing of it")?;
    let (source, mark) = seen.as_ref().map_err(|why| format!("at the source, {why}"))?;
    let path = fs::canonicalize(&disk.path).map_err(|error| cannot_open(&disk.path.display().to_string(), &error))?;
    let name = shown(&disk.path, &path);
    // With all rights that the machine is going to need: writing nothing.
    let file = open_file(&path, disk.readonly, cache).map_err(|error| cannot_open(&name, &error))?;
    let found = file.metadata().map_err(|error| cannot_open(&name, &error))?;
    let found = Identity::of(&found);
    if source.block_device || found.block_device {
        return Err(format!(
            "{name} is a block device: that both hosts see the same one can be proved only by a folder that they share \
             (--ownership DIR), which this version does not have"
        ));
    }
    same_file(&name, source, &found, disk.readonly)?;
    let warning = locks::look(disk, &file, *locked)?;
    let Mark::File(nonce) = mark else {
        return if disk.readonly { Ok((None, warning)) } else { Err("the source has not marked its folder".into()) };
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    nonce.find(folder).map_err(|why| {
        format!(
            "the file that the source has made beside the image {why} in {}: this is another folder, and the image a copy",
            folder.display()
        )
    })?;
    let nonce = files.make(folder).map_err(|error| {
        format!(
            "no file can be made beside the image in {} ({error}; a read-only export, or root squashed?)",
            folder.display()
        )
    })?;
    Ok((Some(nonce), warning))
}

fn same_file(name: &str, source: &Identity, found: &Identity, readonly: bool) -> Result<(), String> {
    if source.inode != found.inode {
        return Err(format!(
            "{name} is another file than the source's (inode {} here, {} there): a copy, or another file system",
            found.inode, source.inode
        ));
    }
    if source.size_bytes != found.size_bytes {
        return Err(format!("{name} has {} bytes here, {} at the source", found.size_bytes, source.size_bytes));
    }
    if readonly && source.modified != found.modified {
        return Err(format!("{name} was last changed at another time than the source's: a copy"));
    }
    Ok(())
}

fn cannot_open(name: &str, error: &io::Error) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::EROFS) => " (a read-only mount)",
        Some(libc::EACCES | libc::EPERM) => " (a read-only export, or root squashed?)",
        _ => "",
    };
    format!("{name} cannot be opened: {error}{hint}")
}

/// A path, and where it leads if that is elsewhere.
fn shown(path: &Path, resolved: &Path) -> String {
    match path == resolved {
        true => path.display().to_string(),
        false => format!("{} (which is {})", path.display(), resolved.display()),
    }
}
