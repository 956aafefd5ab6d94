//! Who keeps whom off an image. QEMU itself is asked in the end-to-end tests.

use std::fs;
use std::path::PathBuf;

use super::*;

/// An image that nobody else can find.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("image"), [0; 4096]).unwrap();
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    fn file(&self) -> File {
        File::options().read(true).write(true).open(self.path()).unwrap()
    }

    fn disk(&self, readonly: bool) -> DiskConfig {
        DiskConfig { id: "root".into(), path: self.path(), readonly }
    }

    fn take(&self, readonly: bool, company: Company) -> Result<ImageLock, String> {
        ImageLock::take(&self.disk(readonly), &self.file(), company).map_err(|error| error.to_string())
    }

    fn boot(&self, readonly: bool) -> Result<ImageLock, String> {
        self.take(readonly, Company::Nobody)
    }

    /// What somebody else sees: all bytes that are held.
    fn held(&self) -> Vec<i64> {
        let file = self.file();
        (0..1000).filter(|byte| is_held(&file, *byte).unwrap()).collect()
    }

    /// Another program that holds these bytes.
    fn other(&self, bytes: &[i64]) -> File {
        let file = self.file();
        bytes.iter().for_each(|byte| hold(&file, *byte).unwrap());
        file
    }
}

/// The locks of a machine that has started with this disk.
pub(in crate::disks) fn taken(disk: &DiskConfig) -> ImageLock {
    ImageLock::take(disk, &File::open(&disk.path).unwrap(), Company::Nobody).unwrap()
}

#[test]
fn the_bytes_are_those_of_qemu() {
    let scene = Scene::new();
    let written = scene.boot(false).unwrap();
    assert_eq!(scene.held(), [100, 101, 201, GODWIT]);
    written.release();
    assert!(!written.is_held());
    assert_eq!(scene.held(), []);
    let read = scene.boot(true).unwrap();
    assert_eq!(scene.held(), [100, 201, GODWIT]);
    drop(read);
    assert_eq!(scene.held(), []);
}

#[test]
fn a_disk_that_is_written_has_one_machine() {
    let scene = Scene::new();
    let first = scene.boot(false).unwrap();
    for readonly in [false, true] {
        let why = scene.boot(readonly).unwrap_err();
        let image = scene.path().display().to_string();
        for expected in
            ["disk root", &image, "another Godwit machine has it open for writing", "byte 101", "end whatever"]
        {
            assert!(why.contains(expected), "{expected} in {why}");
        }
    }
    assert_eq!(scene.held(), [100, 101, 201, GODWIT], "who was refused has left nothing behind");
    first.test().unwrap();
    first.release();
    scene.boot(true).unwrap();
    scene.boot(false).unwrap();
}

#[test]
fn a_disk_that_is_only_read_is_shared_by_readers() {
    let scene = Scene::new();
    let readers = [scene.boot(true).unwrap(), scene.boot(true).unwrap()];
    let why = scene.boot(false).unwrap_err();
    assert!(why.contains("lets nobody write to it"), "{why}");
    readers.iter().for_each(|reader| reader.test().unwrap());
    drop(readers);
    scene.boot(false).unwrap();
}

/// What qemu-img and QEMU hold while they do different things.
#[test]
fn other_programs_keep_machines_off_as_they_keep_each_other_off() {
    let scene = Scene::new();
    for (bytes, write, read) in [
        (&[100, 101, 201][..], false, false), // A guest's disk.
        (&[100, 201], false, true),           // A guest's disk that is only read.
        (&[100, 101], false, false),          // One that is shared with other writers.
        (&[101, 201, 203], false, false),     // Making or resizing an image.
        (&[200], false, false),               // A disk that is being built up by a block job.
        (&[100], true, true),                 // A reader that does not mind writers.
    ] {
        let other = scene.other(bytes);
        assert_eq!(scene.boot(false).is_ok(), write, "{bytes:?}");
        assert_eq!(scene.boot(true).is_ok(), read, "{bytes:?}");
        drop(other);
    }
    let other = scene.other(&[101]);
    assert!(scene.boot(false).unwrap_err().contains("QEMU"));
    drop(other);
    scene.boot(false).unwrap();
}

#[test]
fn a_program_that_locks_all_of_it_for_itself_keeps_machines_off() {
    let scene = Scene::new();
    let other = scene.file();
    call(&other, FcntlArg::F_OFD_SETLK(&libc::flock { l_len: 0, ..range(F_WRLCK, 0) })).unwrap();
    let why = scene.boot(true).unwrap_err();
    assert!(why.contains("for itself alone"), "{why}");
}

#[test]
fn locks_outlive_all_other_descriptors_of_the_image() {
    let scene = Scene::new();
    let image = scene.file();
    let lock = ImageLock::take(&scene.disk(false), &image, Company::Nobody).unwrap();
    let copy = image.try_clone().unwrap();
    drop((image, scene.file(), copy));
    assert_eq!(scene.held(), [100, 101, 201, GODWIT]);
    drop(lock);
    assert_eq!(scene.held(), []);
}

#[test]
fn at_every_step_of_a_move_others_are_kept_off() {
    let scene = Scene::new();
    let refused = |when: &str| assert!(scene.boot(false).is_err() && scene.boot(true).is_err(), "{when}");
    let source = scene.boot(false).unwrap();
    source.test().unwrap();
    refused("before the move");
    let destination = scene.take(false, Company::Source).unwrap();
    refused("both hold it");
    drop(destination);
    refused("the move has failed");
    let destination = scene.take(false, Company::Source).unwrap();
    source.test().expect("an earlier destination that has not let go is not in the way");
    source.release();
    refused("after the move");
    assert_eq!(scene.held(), [100, 101, 201, GODWIT]);
    destination.test().unwrap();
    drop(destination);
    scene.boot(false).unwrap();
}

#[test]
fn a_source_finds_whoever_has_come_in_all_the_same() {
    let scene = Scene::new();
    let source = scene.boot(false).unwrap();
    let other = scene.other(&[100, 101]);
    let why = source.test().unwrap_err();
    assert!(why.contains("in use beside the machine") && why.contains("QEMU"), "{why}");
    drop(other);
    source.test().unwrap();
}

#[test]
fn a_destination_looks_for_its_sources_locks() {
    let scene = Scene::new();
    for readonly in [false, true] {
        let disk = scene.disk(readonly);
        let warned = |source_holds| look(&disk, &scene.file(), source_holds).unwrap().unwrap_or_default();
        assert!(warned(false).contains("the source has no locks"));
        assert!(warned(true).contains("not seen here (is it mounted with nolock"));
        let source = scene.boot(readonly).unwrap();
        assert_eq!(warned(true), "");
        let why = look(&disk, &scene.file(), false);
        assert_eq!(why.is_err(), !readonly, "somebody else holds it: {why:?}");
        // Nothing was taken.
        source.test().unwrap();
        let other = scene.other(&[200]);
        assert!(look(&disk, &scene.file(), true).unwrap_err().contains("is in use"));
        assert!(scene.take(readonly, Company::Source).unwrap_err().contains("lets nobody read it"));
        drop(other);
    }
    let writer = scene.other(&[101]);
    assert!(look(&scene.disk(true), &scene.file(), true).unwrap_err().contains("for writing"));
    drop(writer);
}

#[test]
fn file_systems_without_locks_are_told_apart_from_other_errors() {
    for error in [Errno::ENOLCK, Errno::EOPNOTSUPP, Errno::ENOSYS] {
        let LockError::Unsupported(error) = LockError::from(error) else { panic!("{error}") };
        let text = unlocked(&Scene::new().disk(false), &error);
        assert!(text.contains("cannot be locked") && text.contains("nothing keeps QEMU"), "{text}");
    }
    for error in [Errno::EIO, Errno::ESTALE, Errno::EAGAIN] {
        assert!(matches!(LockError::from(error), LockError::Os(_)), "{error}");
    }
}
