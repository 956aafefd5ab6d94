//! The source's side: what it asks of its disks, and what it makes of the answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_core::{Inquiry, Refusal, codec};

use super::nonce::{Nonce, NonceFiles};
use super::{AskedDisk, Evidence, Identity, ImageLock, Mark, Question, with_storage};
use crate::config::{DiskConfig, MachineConfig};
use crate::error::VmmError;

/// A source's question about its disks. The files that it has made for it are removed when it is dropped.
pub(crate) struct DiskInquiry {
    question: Vec<u8>,
    /// The folders of the disks that are written, by the disks' ids.
    folders: BTreeMap<String, PathBuf>,
    _files: NonceFiles,
}

impl DiskInquiry {
    /// Looks at a machine's disks, whose locks are in the same order, and marks their folders. What is in the way becomes part
    /// of the question: the destination then has all reasons together.
    pub(crate) fn new(config: &MachineConfig, locks: Vec<Arc<ImageLock>>) -> Result<Self, VmmError> {
        let (disks, ids) = (config.disks.clone(), config.disks.iter().map(|disk| disk.id.clone()));
        let looked =
            if disks.is_empty() { Ok(Looked::default()) } else { with_storage(move || Looked::at(&disks, &locks)) };
        let Looked { asked, folders, files } = looked.unwrap_or_else(|why| Looked {
            asked: ids.map(|id| AskedDisk { id, locked: false, seen: Err(why.clone()) }).collect(),
            ..Looked::default()
        });
        let question = Question { unsafe_cache: config.unsafe_cache, disks: asked };
        let question = codec::encode(&question)
            .map_err(|source| VmmError::Codec { what: "cannot encode what is asked about disks", source })?;
        Ok(Self { question, folders, _files: files })
    }
}

impl Inquiry for DiskInquiry {
    fn question(&self) -> Vec<u8> {
        self.question.clone()
    }

    fn judge(&self, evidence: &[u8]) -> Vec<Refusal> {
        let evidence: Evidence = match codec::decode(evidence) {
            Ok(evidence) => evidence,
            Err(error) => return vec![Refusal::new("disk", format!("cannot read the destination's answer: {error}"))],
        };
        let folders = self.folders.clone();
        let judged = with_storage(move || {
            let look = |(id, folder): (&String, &PathBuf)| {
                let reason = find(&evidence, id, folder).err()?;
                Some(Refusal::new(format!("disk {id}"), reason))
            };
            folders.iter().filter_map(look).collect()
        });
        judged.unwrap_or_else(|why| vec![Refusal::new("disk", why)])
    }
}

/// Whether the destination's mark can be seen here.
fn find(evidence: &Evidence, id: &str, folder: &Path) -> Result<(), String> {
    let nonce: &Nonce = match evidence.disks.iter().find(|(other, _)| other == id) {
        Some((_, nonce)) => nonce,
        None => return Err("the destination has not shown that it sees the same folder".into()),
    };
    nonce.find(folder).map_err(|why| {
        format!(
            "the file that the destination has made beside the image {why} in {}: the hosts do not see the same folder",
            folder.display()
        )
    })
}

#[derive(Default)]
struct Looked {
    asked: Vec<AskedDisk>,
    folders: BTreeMap<String, PathBuf>,
    files: NonceFiles,
}

impl Looked {
    fn at(disks: &[DiskConfig], locks: &[Arc<ImageLock>]) -> Self {
        let mut looked = Self::default();
        for (disk, lock) in disks.iter().zip(locks) {
            let seen = lock.test().and_then(|()| looked.look(disk));
            looked.asked.push(AskedDisk { id: disk.id.clone(), locked: lock.is_held(), seen });
        }
        looked
    }

    fn look(&mut self, disk: &DiskConfig) -> Result<(Identity, Mark), String> {
        let (path, identity) = fs::canonicalize(&disk.path)
            .and_then(|path| fs::metadata(&path).map(|metadata| (path, Identity::of(&metadata))))
            .map_err(|error| format!("{} cannot be looked at: {error}", disk.path.display()))?;
        if disk.readonly || identity.block_device {
            return Ok((identity, Mark::None));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        let nonce = self.files.make(folder).map_err(|error| {
            format!("no file can be made beside the image in {} ({error}; squashed root?)", folder.display())
        })?;
        self.folders.insert(disk.id.clone(), folder.into());
        Ok((identity, Mark::File(nonce)))
    }
}
