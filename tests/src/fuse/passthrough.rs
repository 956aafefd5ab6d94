//! The file system, as the kernel asks for it: every call goes through the gate to the folder behind.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno;
use nix::sys::statvfs::Statvfs;

use super::KIND;
use super::gate::Gate;
use super::mode::Call;
use super::tree::{self, Tree, errno};

/// For how long the kernel may believe what it has been told: another mount may change it at any time.
const BELIEF: Duration = Duration::ZERO;

/// Numbers are never used for something else while the kernel knows them, as far as tests go.
const GENERATION: Generation = Generation(0);

/// Reads and writes reach the folder behind at once; closing a file has nothing left to do.
const OPENED: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES).union(FopenFlags::FOPEN_NOFLUSH);

/// A folder behind a gate.
pub struct Passthrough {
    tree: Arc<Tree>,
    gate: Gate,
}

/// Mounts `backing` at `mountpoint` and serves it for as long as the session exists.
pub fn serve(backing: &Path, mountpoint: &Path, gate: Gate) -> io::Result<BackgroundSession> {
    let tree = Arc::new(Tree::new(backing.canonicalize()?));
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName(KIND.into()), MountOption::Subtype(KIND.into())];
    fuser::spawn_mount(Passthrough { tree, gate }, mountpoint, &config)
}

impl Passthrough {
    fn pass<T>(
        &self,
        request: &Request,
        call: Call,
        make: impl FnOnce(&Tree) -> Result<T, Errno> + Send + 'static,
        answer: impl FnOnce(Result<T, fuser::Errno>) + Send + 'static,
    ) {
        let tree = Arc::clone(&self.tree);
        let answer = |result: Result<T, Errno>| answer(result.map_err(|errno| fuser::Errno::from_i32(errno as i32)));
        self.gate.pass(call, request.pid(), move || make(&tree), answer);
    }
}

/// Answers with `ok` of the result, or with the error.
macro_rules! answer {
    ($reply:ident, $result:pat => $ok:expr) => {
        move |result| match result {
            Ok($result) => $ok,
            Err(errno) => $reply.error(errno),
        }
    };
}

impl Filesystem for Passthrough {
    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.lookup(parent, &name);
        self.pass(request, Call::Look, make, answer!(reply, found => reply.entry(&BELIEF, &found, GENERATION)));
    }

    fn getattr(&self, request: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let make = move |tree: &Tree| tree.attributes(node);
        self.pass(request, Call::Look, make, answer!(reply, found => reply.attr(&BELIEF, &found)));
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let make = move |tree: &Tree| tree.change(node, mode, size);
        self.pass(request, Call::Change, make, answer!(reply, found => reply.attr(&BELIEF, &found)));
    }

    fn readlink(&self, request: &Request, node: INodeNo, reply: ReplyData) {
        let make = move |tree: &Tree| tree.read_link(node);
        self.pass(request, Call::Look, make, answer!(reply, target => reply.data(&target)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target) = (name.to_owned(), target.to_owned());
        let make = move |tree: &Tree| tree.symlink(parent, &name, &target);
        self.pass(request, Call::Link, make, answer!(reply, made => reply.entry(&BELIEF, &made, GENERATION)));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.make_directory(parent, &name, mode & !umask);
        self.pass(request, Call::Change, make, answer!(reply, made => reply.entry(&BELIEF, &made, GENERATION)));
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.remove(parent, &name);
        self.pass(request, Call::Change, make, answer!(reply, () => reply.ok()));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.remove_directory(parent, &name);
        self.pass(request, Call::Change, make, answer!(reply, () => reply.ok()));
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let make = move |tree: &Tree| match flags.is_empty() {
            true => tree.rename((parent, &name), (new_parent, &new_name)),
            false => Err(Errno::EINVAL),
        };
        self.pass(request, Call::Change, make, answer!(reply, () => reply.ok()));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name.to_owned();
        let make = move |tree: &Tree| tree.create(parent, &name, mode & !umask, flags);
        let answer = answer!(reply, (made, handle) => {
            reply.created(&BELIEF, &made, GENERATION, FileHandle(handle), OPENED)
        });
        self.pass(request, Call::Change, make, answer);
    }

    fn open(&self, request: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let make = move |tree: &Tree| tree.open(node, flags.0);
        self.pass(request, Call::Look, make, answer!(reply, handle => reply.opened(FileHandle(handle), OPENED)));
    }

    fn read(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let make = move |tree: &Tree| tree::read(&*tree.file(handle.0)?, offset, size as usize);
        self.pass(request, Call::Read, make, answer!(reply, data => reply.data(&data)));
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        let make = move |tree: &Tree| tree.file(handle.0)?.write_at(&data, offset).map_err(errno);
        self.pass(request, Call::Write, make, answer!(reply, written => reply.written(written as u32)));
    }

    fn fsync(&self, request: &Request, _: INodeNo, handle: FileHandle, _: bool, reply: ReplyEmpty) {
        let make = move |tree: &Tree| tree.file(handle.0)?.sync_all().map_err(errno);
        self.pass(request, Call::Flush, make, answer!(reply, () => reply.ok()));
    }

    /// Closing a file holds nobody up: a dying process could not be got rid of.
    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.close(handle.0);
        reply.ok();
    }

    fn opendir(&self, request: &Request, node: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let make = move |tree: &Tree| tree.open_directory(node);
        let answer = answer!(reply, handle => reply.opened(FileHandle(handle), FopenFlags::empty()));
        self.pass(request, Call::Look, make, answer);
    }

    fn readdir(&self, request: &Request, _: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let make = move |tree: &Tree| tree.listing(handle.0);
        let answer = move |listing: Result<Arc<Vec<tree::Entry>>, fuser::Errno>| match listing {
            Ok(entries) => {
                for (index, entry) in entries.iter().enumerate().skip(offset as usize) {
                    if reply.add(entry.node, index as u64 + 1, entry.kind, &entry.name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(errno) => reply.error(errno),
        };
        self.pass(request, Call::Look, make, answer);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.tree.close_directory(handle.0);
        reply.ok();
    }

    fn statfs(&self, request: &Request, _: INodeNo, reply: ReplyStatfs) {
        let answer = move |usage: Result<Statvfs, fuser::Errno>| match usage {
            Ok(usage) => reply.statfs(
                usage.blocks(),
                usage.blocks_free(),
                usage.blocks_available(),
                usage.files(),
                usage.files_free(),
                usage.block_size() as u32,
                usage.name_max() as u32,
                usage.fragment_size() as u32,
            ),
            Err(errno) => reply.error(errno),
        };
        self.pass(request, Call::Look, Tree::usage, answer);
    }
}
