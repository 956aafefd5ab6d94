//! Bytes to be written: what was written makes room for what comes next, and room is not cleared before it is used.

use std::ops::{Deref, DerefMut};

/// A buffer that grows at its end. Bytes beyond the end are left over from before.
pub(crate) struct Output {
    bytes: Vec<u8>,
    length: usize,
}

impl Output {
    /// An empty one, to which so many bytes can be added before it grows.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity], length: 0 }
    }

    /// Adds `count` bytes, which are to be written over: there may be anything in them.
    pub(crate) fn add_room(&mut self, count: usize) {
        self.length += count;
        if self.bytes.len() < self.length {
            self.bytes.resize(self.length, 0);
        }
    }

    /// Adds `bytes`.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        let at = self.length;
        self.add_room(bytes.len());
        self[at..].copy_from_slice(bytes);
    }

    /// Takes away what is beyond `length`.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// What was taken away last from the end on, unless something was added since.
    pub(crate) fn taken_away(&self) -> &[u8] {
        &self.bytes[self.length..]
    }

    /// The bytes, and how many of them count, for whoever puts another buffer of the same length in their place.
    pub(crate) fn buffer(&mut self) -> (&mut Vec<u8>, usize) {
        (&mut self.bytes, self.length)
    }

    /// Takes away all.
    pub(crate) fn clear(&mut self) {
        self.length = 0;
    }
}

impl Deref for Output {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Output {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_was_put_in_whatever_was_there_before() {
        let mut output = Output::with_capacity(4);
        output.extend(b"abc");
        output.extend(b"defgh");
        assert_eq!(*output, *b"abcdefgh");
        output.truncate(2);
        output.truncate(5);
        assert_eq!(*output, *b"ab");
        assert_eq!(output.taken_away(), *b"cdefgh");
        output.add_room(1);
        output[2] = b'x';
        output.extend(b"y");
        assert_eq!(*output, *b"abxy");
        output.clear();
        assert!(output.is_empty());
        output.extend(b"z");
        assert_eq!(*output, *b"z");
    }
}
