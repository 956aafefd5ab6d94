//! Splits what a peer writes into messages of bounded length.
//!
//! A message is a line. But some clients end none of theirs (QEMU's own Python package among them), so a JSON object
//! is also a message as soon as its last brace has come.

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

/// Splits what a peer writes into messages. An error of kind `WouldBlock` or `TimedOut` loses nothing: call again.
pub struct LineReader<R> {
    inner: R,
    limit_bytes: usize,
    buffer: Vec<u8>,
    /// How much of `buffer` has been scanned: the message does not end in it.
    scanned: usize,
    scan: Scan,
    /// Inside a message that is too long.
    skipping: bool,
    ended: bool,
}

impl<R: Read> LineReader<R> {
    /// A reader of messages of at most `limit_bytes`.
    pub fn new(inner: R, limit_bytes: usize) -> Self {
        let scan = Scan::default();
        LineReader { inner, limit_bytes, buffer: Vec::new(), scanned: 0, scan, skipping: false, ended: false }
    }

    /// Where the messages come from.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The next message that is not blank. What stands before the end of the stream counts as one.
    pub fn next_line(&mut self) -> io::Result<Line> {
        loop {
            if let Some(length) = self.message_length() {
                let rest = self.buffer.split_off(length);
                let message = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                self.scan = Scan::default();
                if std::mem::take(&mut self.skipping) || message.trim_ascii_end().len() > self.limit_bytes {
                    return Ok(Line::TooLong);
                }
                if message.trim_ascii().is_empty() {
                    continue;
                }
                return Ok(Line::Text(message.trim_ascii_end().to_vec()));
            }
            if self.scanned > self.limit_bytes {
                self.skipping = true;
                self.buffer.clear();
                self.scanned = 0;
            }
            if self.ended {
                return Ok(Line::End);
            }
            self.fill()?;
        }
    }

    /// The length of the first message in the buffer, its end included, if it has one.
    fn message_length(&mut self) -> Option<usize> {
        while let Some(byte) = self.buffer.get(self.scanned) {
            self.scanned += 1;
            if self.scan.ends_with(*byte) {
                return Some(self.scanned);
            }
        }
        None
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

/// Looks for the end of one message, byte by byte.
#[derive(Default)]
struct Scan {
    kind: Kind,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

#[derive(Default, PartialEq)]
enum Kind {
    #[default]
    Blank,
    Object,
    Other,
}

impl Scan {
    /// Takes in the next byte; true if the message ends with it.
    fn ends_with(&mut self, byte: u8) -> bool {
        // No JSON that fits on a line holds one.
        if byte == b'\n' {
            return true;
        }
        if self.kind == Kind::Blank && !byte.is_ascii_whitespace() {
            self.kind = if byte == b'{' { Kind::Object } else { Kind::Other };
        }
        self.kind == Kind::Object && self.closes(byte)
    }

    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' => self.depth += 1,
            b'}' => self.depth -= 1,
            _ => {}
        }
        self.depth == 0
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

    #[test]
    fn an_object_ends_with_its_last_brace() {
        let text = |text: &str| Line::Text(text.as_bytes().to_vec());
        let input = br#"{"a":"}\"{"}{"b":{}} {"c":[{}]}"#;
        let expected = [text(r#"{"a":"}\"{"}"#), text(r#"{"b":{}}"#), text(r#" {"c":[{}]}"#)];
        assert_eq!(lines(input, vec![1; 100], 100), expected);
        // Not an object: up to the end of the line. An object that is not whole ends there too.
        assert_eq!(lines(b"GET {x} y\n{\"a\":{\n}\n", vec![], 100), [text("GET {x} y"), text(r#"{"a":{"#), text("}")]);
        let long = br#"{"a":"xxxxxxxxxxxxxxxxxxxxx"}{"b":1}"#;
        assert_eq!(lines(long, vec![3; 100], 10), [Line::TooLong, text(r#"{"b":1}"#)]);
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
