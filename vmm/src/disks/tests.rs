//! Two hosts in one process: each disk seen by both, or not.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_core::{Inquiry, Refusal, codec};
use proptest::prelude::*;

use super::*;
use crate::config::{DiskConfig, GuestKind, MachineConfig};
use crate::incoming::{HostOptions, places};

/// A folder with an image of a MiB, and one that is somewhere else.
struct Hosts {
    folder: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
    config: MachineConfig,
    /// The source's.
    lock: Arc<ImageLock>,
    options: HostOptions,
}

impl Hosts {
    fn new() -> Self {
        Self::with(false)
    }

    fn read_only() -> Self {
        Self::with(true)
    }

    fn with(readonly: bool) -> Self {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = folder.path().join("root.img");
        fs::write(&path, vec![1; 1 << 20]).unwrap();
        let config = MachineConfig {
            guest: Some(GuestKind::Writer),
            disks: vec![DiskConfig { id: "root".into(), path, readonly }],
            ..MachineConfig::default()
        };
        let lock = Arc::new(locks::tests::taken(&config.disks[0]));
        let options = HostOptions { disk_dirs: vec![folder.path().into()], ..HostOptions::default() };
        Self { folder, elsewhere, config, lock, options }
    }

    fn image(&self) -> &Path {
        &self.config.disks[0].path
    }

    /// The destination is to open this file.
    fn map(&mut self, path: impl Into<PathBuf>) {
        self.options.map_disks = BTreeMap::from([("root".into(), path.into())]);
    }

    /// What the source asks.
    fn inquiry(&self) -> DiskInquiry {
        DiskInquiry::new(&self.config, vec![Arc::clone(&self.lock)]).unwrap()
    }

    /// What the destination says.
    fn verdict(&self, question: &[u8]) -> DiskVerdict {
        match places::find(&self.config, &self.options) {
            Ok(here) => DiskVerdict::new(&here, question),
            Err(refusals) => DiskVerdict::refused(refusals),
        }
    }

    /// Both legs; everything that either side has against the move.
    fn preflight(&self) -> Vec<Refusal> {
        let inquiry = self.inquiry();
        let verdict = self.verdict(&inquiry.question());
        if !verdict.refusals.is_empty() {
            return verdict.refusals.clone();
        }
        inquiry.judge(&verdict.evidence)
    }

    /// Why the move is refused; nothing is left behind.
    fn refused(&self) -> String {
        let refusals = self.preflight();
        let [refusal] = &refusals[..] else { panic!("{refusals:?}") };
        assert_eq!(self.nonces(), 0);
        refusal.to_string()
    }

    fn accepted(&self) {
        assert_eq!(self.preflight(), Vec::new());
        assert_eq!(self.nonces(), 0, "nothing is left behind");
    }

    fn nonces(&self) -> usize {
        let count = |folder: &Path| {
            let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_string_lossy().starts_with(".godwit")).count()
        };
        count(self.folder.path()) + count(self.elsewhere.path())
    }
}

#[test]
fn the_same_file_is_accepted_and_nothing_is_left_behind() {
    let hosts = Hosts::new();
    hosts.accepted();
    let inquiry = hosts.inquiry();
    let verdict = hosts.verdict(&inquiry.question());
    assert_eq!(hosts.nonces(), 2);
    drop(inquiry);
    assert_eq!(hosts.nonces(), 1);
    drop(verdict);
    assert_eq!(hosts.nonces(), 0);
    Hosts::read_only().accepted();
}

#[test]
fn links_are_resolved_at_both_ends() {
    let mut hosts = Hosts::new();
    let image = hosts.image().to_owned();
    let link = hosts.elsewhere.path().join("link.img");
    symlink(&image, &link).unwrap();
    hosts.config.disks[0].path = link.clone();
    hosts.accepted();
    hosts.options.disk_dirs = vec![hosts.elsewhere.path().into()];
    let why = hosts.refused();
    assert!(why.contains("--disk-dir"), "where it leads counts: {why}");
    let folder = hosts.elsewhere.path().join("dir");
    symlink(hosts.folder.path(), &folder).unwrap();
    hosts.options.disk_dirs = vec![folder];
    hosts.accepted();
}

#[test]
fn a_copy_is_refused() {
    let mut hosts = Hosts::new();
    let copy = hosts.elsewhere.path().join("root.img");
    fs::copy(hosts.image(), &copy).unwrap();
    hosts.map(&copy);
    assert!(hosts.refused().contains("another file than the source's (inode"));
    // The same inode number on another file system: a hard link stands for it.
    fs::remove_file(&copy).unwrap();
    fs::hard_link(hosts.image(), &copy).unwrap();
    let why = hosts.refused();
    assert!(why.contains("the file that the source has made beside the image is not there"), "{why}");
}

#[test]
fn a_copy_that_is_only_read_is_refused() {
    let mut hosts = Hosts::read_only();
    let copy = hosts.elsewhere.path().join("root.img");
    fs::copy(hosts.image(), &copy).unwrap();
    hosts.map(&copy);
    assert!(hosts.refused().contains("another file"));
    let inquiry = hosts.inquiry();
    hosts.options.map_disks.clear();
    fs::write(hosts.image(), vec![2; 1 << 20]).unwrap();
    let verdict = hosts.verdict(&inquiry.question());
    assert!(verdict.refusals[0].reason.contains("changed at another time"), "{:?}", verdict.refusals);
}

#[test]
fn a_missing_mount_another_size_and_a_folder_are_refused() {
    let mut hosts = Hosts::new();
    hosts.map(hosts.elsewhere.path().join("not-mounted/root.img"));
    assert!(hosts.refused().contains("No such file or directory"));
    let folder = hosts.elsewhere.path().to_owned();
    hosts.map(folder);
    assert!(hosts.refused().contains("cannot be opened"));
    hosts.options.map_disks.clear();
    let inquiry = hosts.inquiry();
    fs::OpenOptions::new().write(true).open(hosts.image()).unwrap().set_len(2 << 20).unwrap();
    let verdict = hosts.verdict(&inquiry.question());
    assert!(verdict.refusals[0].reason.contains("2097152 bytes here, 1048576 at the source"), "{:?}", verdict.refusals);
    drop((inquiry, verdict));
    fs::remove_file(hosts.image()).unwrap();
    hosts.map("/dev/null");
    assert!(hosts.refused().contains("at the source,"), "the source's own trouble is told, too");
}

#[test]
fn only_what_the_receiver_allows_is_opened() {
    let mut hosts = Hosts::new();
    hosts.options.disk_dirs.clear();
    let why = hosts.refused();
    assert!(why.contains("--disk-dir") && why.contains("--map-disk root=PATH"), "{why}");
    hosts.options.disk_dirs = vec![hosts.elsewhere.path().into(), "/nonexistent".into()];
    assert!(hosts.refused().contains("--disk-dir"));
    let image = hosts.image().to_owned();
    hosts.map(image);
    hosts.accepted();
    hosts.options.map_disks.clear();
    hosts.config.disks[0].path = hosts.folder.path().join("../etc/root.img");
    assert!(!hosts.preflight().is_empty());
}

#[test]
fn a_folder_that_the_destination_sees_read_only_is_refused() {
    // Root may write anywhere: then there is nothing to see.
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        return;
    }
    let hosts = Hosts::new();
    let inquiry = hosts.inquiry();
    fs::set_permissions(hosts.folder.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let verdict = hosts.verdict(&inquiry.question());
    fs::set_permissions(hosts.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(verdict.refusals[0].reason.contains("read-only export, or root squashed"), "{:?}", verdict.refusals);
}

#[test]
fn what_the_source_cannot_see_of_the_destination_is_refused() {
    let hosts = Hosts::new();
    let inquiry = hosts.inquiry();
    let verdict = hosts.verdict(&inquiry.question());
    let evidence = verdict.evidence.clone();
    assert_eq!(inquiry.judge(&evidence), Vec::new());
    drop(verdict);
    assert!(inquiry.judge(&evidence)[0].reason.contains("is not there"), "the destination's mark is looked for");
    let nothing = codec::encode(&Evidence::default()).unwrap();
    assert!(inquiry.judge(&nothing)[0].reason.contains("has not shown"));
    assert!(!inquiry.judge(b"nonsense").is_empty());
}

#[test]
fn the_page_cache_is_used_only_if_both_ends_say_so() {
    let mut hosts = Hosts::new();
    hosts.config.unsafe_cache = true;
    assert!(hosts.refused().contains("--unsafe-cache"));
    hosts.options.unsafe_cache = true;
    hosts.accepted();
    let inquiry = hosts.inquiry();
    let verdict = hosts.verdict(&inquiry.question());
    assert!(verdict.warnings[0].contains("--unsafe-cache"));
}

#[test]
fn block_devices_are_refused_and_what_would_do_is_said() {
    let hosts = Hosts::new();
    let inquiry = hosts.inquiry();
    let mut question: Question = codec::decode(&inquiry.question()).unwrap();
    if let Ok((identity, _)) = &mut question.disks[0].seen {
        identity.block_device = true;
    }
    let verdict = hosts.verdict(&codec::encode(&question).unwrap());
    assert!(verdict.refusals[0].reason.contains("--ownership DIR"));
}

#[test]
fn a_source_that_leaves_something_out_is_refused() {
    let hosts = Hosts::new();
    let inquiry = hosts.inquiry();
    let asked: Question = codec::decode(&inquiry.question()).unwrap();
    let refused = |question: &Question| !hosts.verdict(&codec::encode(question).unwrap()).refusals.is_empty();
    assert!(!refused(&asked));
    assert!(refused(&Question { disks: Vec::new(), ..asked.clone() }));
    let mut unmarked = asked;
    if let Ok((_, mark)) = &mut unmarked.disks[0].seen {
        *mark = Mark::None;
    }
    assert!(refused(&unmarked), "a disk that is written needs a mark");
}

proptest! {
    #[test]
    fn any_bytes_as_a_question_or_an_answer_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let hosts = Hosts::new();
        prop_assert!(!hosts.verdict(&bytes).refusals.is_empty());
        prop_assert!(!hosts.inquiry().judge(&bytes).is_empty());
    }
}
