//! Reads lines of bounded length.

use std::io::{self, Read};

/// No line, in either direction, is longer than this.
pub const MAX_LINE_BYTES: usize = 1 << 20;

const READ_BYTES: usize = 16 << 10;

/// What [`LineReader::next_line`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A line, without its end.
    Text(Vec<u8>),
    /// A line that was longer than the limit. All of it has been skipped.
    TooLong,
    /// The peer will write nothing more.
    End,
}

/// Splits what a peer writes into lines. An error of kind `WouldBlock` or `TimedOut` loses nothing: call again.
pub struct LineReader<R> {
    inner: R,
    limit_bytes: usize,
    buffer: Vec<u8>,
    /// How much of `buffer` is known to hold no end of line.
    searched: usize,
    /// Inside a line that is too long.
    skipping: bool,
    ended: bool,
}

impl<R: Read> LineReader<R> {
    /// A reader of lines of at most `limit_bytes`.
    pub fn new(inner: R, limit_bytes: usize) -> Self {
        LineReader { inner, limit_bytes, buffer: Vec::new(), searched: 0, skipping: false, ended: false }
    }

    /// Where the lines come from.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The next line that is not blank. What stands before the end of the stream counts as a line.
    pub fn next_line(&mut self) -> io::Result<Line> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                self.searched = 0;
                if std::mem::take(&mut self.skipping) || line.len() > self.limit_bytes {
                    return Ok(Line::TooLong);
                }
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Line::Text(line));
            }
            self.searched = self.buffer.len();
            if self.searched > self.limit_bytes {
                self.skipping = true;
                self.buffer.clear();
                self.searched = 0;
            }
            if self.ended {
                return Ok(Line::End);
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; READ_BYTES];
        let length = match self.inner.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        };
        if length == 0 {
            self.ended = true;
            if self.skipping || !self.buffer.is_empty() {
                self.buffer.push(b'\n');
            }
        }
        self.buffer.extend_from_slice(&chunk[..length]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Hands out its bytes in pieces of the given sizes, with a timeout before each.
    struct Pieces {
        bytes: Vec<u8>,
        sizes: Vec<usize>,
        time_out: bool,
    }

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.time_out = !self.time_out;
            if self.time_out {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let size = self.sizes.pop().unwrap_or(usize::MAX).min(buffer.len()).min(self.bytes.len());
            buffer[..size].copy_from_slice(&self.bytes[..size]);
            self.bytes.drain(..size);
            Ok(size)
        }
    }

    fn lines(bytes: &[u8], sizes: Vec<usize>, limit_bytes: usize) -> Vec<Line> {
        let mut reader = LineReader::new(Pieces { bytes: bytes.to_vec(), sizes, time_out: false }, limit_bytes);
        let mut lines = Vec::new();
        loop {
            match reader.next_line() {
                Ok(Line::End) => return lines,
                Ok(line) => lines.push(line),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }

    #[test]
    fn a_long_line_is_skipped_whole_and_the_next_is_read() {
        let text = |text: &str| Line::Text(text.as_bytes().to_vec());
        let input = b"one\n\n12345678901\n  \r\ntwo\nthree";
        assert_eq!(lines(input, vec![], 10), [text("one"), Line::TooLong, text("two"), text("three")]);
        assert_eq!(lines(&[b'x'; 5000], vec![7; 1000], 10), [Line::TooLong]);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            given in proptest::collection::vec("[a-z]{1,30}", 0..20),
            sizes in proptest::collection::vec(1usize..40, 0..100),
        ) {
            let expected: Vec<Line> = given
                .iter()
                .map(|line| if line.len() > 20 { Line::TooLong } else { Line::Text(line.clone().into_bytes()) })
                .collect();
            let bytes: String = given.iter().map(|line| format!("{line}\n")).collect();
            prop_assert_eq!(lines(bytes.as_bytes(), sizes, 20), expected);
        }
    }
}
