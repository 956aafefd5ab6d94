//! The folder behind the mount: nodes, known by their inode numbers, and open files.
//!
//! A node's number is that of the inode behind it, so that every mount of one folder shows the same numbers, as an NFS server
//! does to its clients.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{DirBuilderExt, DirEntryExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{FileAttr, FileType, INodeNo};
use nix::errno::Errno;
use nix::sys::statvfs::{Statvfs, statvfs};

/// A folder and what is open in it.
#[derive(Debug)]
pub struct Tree {
    /// Where each node was last seen.
    paths: Mutex<HashMap<INodeNo, PathBuf>>,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    files: HashMap<u64, Arc<File>>,
    listings: HashMap<u64, Arc<Vec<Entry>>>,
}

/// An entry of a directory.
#[derive(Debug)]
pub struct Entry {
    /// Its node.
    pub node: INodeNo,
    /// What it is.
    pub kind: FileType,
    /// Its name.
    pub name: OsString,
}

impl Tree {
    /// The tree below `root`, which is an absolute path.
    pub fn new(root: PathBuf) -> Self {
        Self { paths: Mutex::new(HashMap::from([(INodeNo::ROOT, root)])), open: Mutex::default() }
    }

    /// Looks an entry up.
    pub fn lookup(&self, parent: INodeNo, name: &OsStr) -> Result<FileAttr, Errno> {
        let path = self.child(parent, name)?;
        self.remember(path)
    }

    /// A node's attributes.
    pub fn attributes(&self, node: INodeNo) -> Result<FileAttr, Errno> {
        attributes(&fs::symlink_metadata(self.path(node)?).map_err(errno)?)
    }

    /// Changes a file's size and permissions. Its times are those of the file system behind.
    pub fn change(&self, node: INodeNo, permissions: Option<u32>, size: Option<u64>) -> Result<FileAttr, Errno> {
        let path = self.path(node)?;
        if let Some(mode) = permissions {
            fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(errno)?;
        }
        if let Some(size) = size {
            OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(size)).map_err(errno)?;
        }
        self.attributes(node)
    }

    /// What a symbolic link says.
    pub fn read_link(&self, node: INodeNo) -> Result<Vec<u8>, Errno> {
        fs::read_link(self.path(node)?).map(|target| target.into_os_string().into_vec()).map_err(errno)
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, parent: INodeNo, name: &OsStr, target: &Path) -> Result<FileAttr, Errno> {
        let path = self.child(parent, name)?;
        symlink(target, &path).map_err(errno)?;
        self.remember(path)
    }

    /// Makes a directory.
    pub fn make_directory(&self, parent: INodeNo, name: &OsStr, mode: u32) -> Result<FileAttr, Errno> {
        let path = self.child(parent, name)?;
        fs::DirBuilder::new().mode(mode).create(&path).map_err(errno)?;
        self.remember(path)
    }

    /// Removes a directory.
    pub fn remove_directory(&self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        fs::remove_dir(self.child(parent, name)?).map_err(errno)
    }

    /// Removes any other entry.
    pub fn remove(&self, parent: INodeNo, name: &OsStr) -> Result<(), Errno> {
        fs::remove_file(self.child(parent, name)?).map_err(errno)
    }

    /// Renames an entry.
    pub fn rename(&self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr)) -> Result<(), Errno> {
        fs::rename(self.child(from.0, from.1)?, self.child(to.0, to.1)?).map_err(errno)
    }

    /// Makes and opens a file.
    pub fn create(&self, parent: INodeNo, name: &OsStr, mode: u32, flags: i32) -> Result<(FileAttr, u64), Errno> {
        let path = self.child(parent, name)?;
        let file = options(flags).create(true).mode(mode).custom_flags(flags & libc::O_EXCL).open(&path);
        let handle = self.open_files().add(file.map_err(errno)?);
        Ok((self.remember(path)?, handle))
    }

    /// Opens a file.
    pub fn open(&self, node: INodeNo, flags: i32) -> Result<u64, Errno> {
        let file = options(flags).open(self.path(node)?).map_err(errno)?;
        Ok(self.open_files().add(file))
    }

    /// An open file.
    pub fn file(&self, handle: u64) -> Result<Arc<File>, Errno> {
        self.open_files().files.get(&handle).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a file.
    pub fn close(&self, handle: u64) {
        self.open_files().files.remove(&handle);
    }

    /// Lists a directory as it is now.
    pub fn open_directory(&self, node: INodeNo) -> Result<u64, Errno> {
        let entries =
            fs::read_dir(self.path(node)?).and_then(|entries| entries.map(|entry| entry?.try_into()).collect());
        let entries: Vec<Entry> = entries.map_err(errno)?;
        let mut open = self.open_files();
        open.next += 1;
        let handle = open.next;
        open.listings.insert(handle, Arc::new(entries));
        Ok(handle)
    }

    /// The entries of an open directory.
    pub fn listing(&self, handle: u64) -> Result<Arc<Vec<Entry>>, Errno> {
        self.open_files().listings.get(&handle).cloned().ok_or(Errno::EBADF)
    }

    /// Closes a directory.
    pub fn close_directory(&self, handle: u64) {
        self.open_files().listings.remove(&handle);
    }

    /// How full the file system is.
    pub fn usage(&self) -> Result<Statvfs, Errno> {
        statvfs(&self.path(INodeNo::ROOT)?)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Result<PathBuf, Errno> {
        Ok(self.path(parent)?.join(name))
    }

    fn path(&self, node: INodeNo) -> Result<PathBuf, Errno> {
        self.paths().get(&node).cloned().ok_or(Errno::ESTALE)
    }

    fn remember(&self, path: PathBuf) -> Result<FileAttr, Errno> {
        let attributes = attributes(&fs::symlink_metadata(&path).map_err(errno)?)?;
        self.paths().insert(attributes.ino, path);
        Ok(attributes)
    }

    fn paths(&self) -> MutexGuard<'_, HashMap<INodeNo, PathBuf>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_files(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn add(&mut self, file: File) -> u64 {
        self.next += 1;
        self.files.insert(self.next, Arc::new(file));
        self.next
    }
}

impl TryFrom<fs::DirEntry> for Entry {
    type Error = io::Error;

    fn try_from(entry: fs::DirEntry) -> io::Result<Self> {
        let kind = FileType::from_std(entry.file_type()?).unwrap_or(FileType::RegularFile);
        Ok(Self { node: INodeNo(entry.ino()), kind, name: entry.file_name() })
    }
}

/// Reads up to `length` bytes, fewer only at the end.
pub fn read(file: &File, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    let mut data = vec![0; length];
    let mut read = 0;
    while read < length {
        match file.read_at(&mut data[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) => return Err(errno(error)),
        }
    }
    data.truncate(read);
    Ok(data)
}

/// What std's errors of system calls say.
pub fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The access that was asked for. O_DIRECT is for the mount to keep: the folder behind is shared through one page cache.
fn options(flags: i32) -> OpenOptions {
    let access = flags & libc::O_ACCMODE;
    let mut options = OpenOptions::new();
    options.read(access != libc::O_WRONLY).write(access != libc::O_RDONLY);
    options
}

fn attributes(data: &fs::Metadata) -> Result<FileAttr, Errno> {
    let created = data.modified().map_err(errno)?;
    let since_epoch = |seconds: i64, nanoseconds: i64| {
        let elapsed = std::time::Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        std::time::UNIX_EPOCH + elapsed
    };
    Ok(FileAttr {
        ino: INodeNo(data.ino()),
        size: data.size(),
        blocks: data.blocks(),
        atime: since_epoch(data.atime(), data.atime_nsec()),
        mtime: since_epoch(data.mtime(), data.mtime_nsec()),
        ctime: since_epoch(data.ctime(), data.ctime_nsec()),
        crtime: created,
        kind: FileType::from_std(data.file_type()).ok_or(Errno::EIO)?,
        perm: (data.mode() & 0o7777) as u16,
        nlink: data.nlink() as u32,
        uid: data.uid(),
        gid: data.gid(),
        rdev: data.rdev() as u32,
        blksize: data.blksize() as u32,
        flags: 0,
    })
}
