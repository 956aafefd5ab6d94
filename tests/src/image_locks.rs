//! The locks on a disk image, as another program sees them.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::Pid;

/// Beyond the last byte that anybody locks.
const END: i64 = 400;

/// The bytes that somebody holds.
pub fn held(image: &Path) -> Result<Vec<i64>> {
    let file = File::open(image).with_context(|| image.display().to_string())?;
    (0..END).filter_map(|byte| is_held(&file, byte).map(|held| held.then_some(byte)).transpose()).collect()
}

/// Whether the process holds locks of its own on the image: on an open file, not as a process.
pub fn holds(pid: Pid, image: &Path) -> Result<bool> {
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(image)?);
    let ours = |line: &str| line.contains("OFDLCK") && line.contains(&format!(":{inode} "));
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // It may have been closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        if text.lines().any(|line| line.starts_with("lock:") && ours(line)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Looks at an image's locks again and again, as fast as it can.
pub struct Watch {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Result<Seen>>,
}

/// What a [`Watch`] has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// How often it has looked.
    pub looks: u64,
    /// How often nothing would have kept a writer off.
    pub free: u64,
}

impl Watch {
    /// Starts to look.
    pub fn start(image: &Path) -> Result<Self> {
        let (file, ended) = (File::open(image)?, Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut seen = Seen::default();
            while !over.load(Ordering::Relaxed) {
                seen.looks += 1;
                // Who wants to write tests both: that nobody writes, and that nobody minds.
                if !is_held(&file, 101)? || !is_held(&file, 201)? {
                    seen.free += 1;
                }
            }
            Ok(seen)
        });
        Ok(Self { ended, thread })
    }

    /// Ends it.
    pub fn end(self) -> Result<Seen> {
        self.ended.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the thread that watches the locks panicked"))?
    }
}

fn is_held(file: &File, byte: i64) -> Result<bool> {
    let mut range = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut range)).context("cannot test a lock")?;
    Ok(i32::from(range.l_type) != libc::F_UNLCK)
}
