//! The kernel's log, read record by record.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use godwit_tests::scenario::klog::Line;

/// Longer than the longest record that the kernel gives out.
const RECORD_LIMIT: usize = 16 << 10;

/// Every warning since boot, one a line, and an empty line.
pub(crate) fn warnings() -> io::Result<String> {
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut record = vec![0; RECORD_LIMIT];
    let mut lines = String::new();
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(lines),
            Ok(length) => {
                if let Some(line) = Line::from_kmsg(&String::from_utf8_lossy(&record[..length])) {
                    lines += &format!("{line}\n");
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
            // The record was overwritten while we read: the next one is there.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}
