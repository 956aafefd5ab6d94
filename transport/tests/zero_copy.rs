//! What is sent without a copy arrives as it was when it was written, and a link over which the kernel copies after all is told of.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::ErrorKind;
use std::thread;
use std::time::Duration;

use common::*;
use godwit_core::{Channel, IncomingData, SessionToken};
use godwit_transport::{Listener, Options, connect, listen};

/// Larger than what goes without a copy, and no multiple of what a socket takes at once.
const WRITE_BYTES: usize = 150_001;
const WRITES: usize = 100;

/// A listener, and the two ends of a data channel that is to send without copying: dialled, accepted.
fn data(uri: &str) -> (Listener, Channel, Channel) {
    let listener = listen(&uri.parse().unwrap(), Options::default()).unwrap();
    let dial = connect(listener.uri(), Options { zero_copy: true, ..Options::default() }).unwrap();
    let (token, mut incoming) = (SessionToken([1; 16]), listener.incoming_data());
    incoming.expect(token);
    let dialled = dial.data(token, 0, LIMIT).unwrap();
    let (_, accepted) = incoming.accept(LIMIT).unwrap();
    (listener, dialled, accepted)
}

/// Writes the pattern from one buffer, which is written over as soon as the channel is done with it, and says what the channel has said.
fn write_from_one_buffer(channel: Channel, writes: usize) -> Vec<String> {
    let Channel { mut writer, reader: _reader, .. } = channel;
    let (mut buffer, mut said) = (vec![0; 2 * WRITE_BYTES], Vec::new());
    for write in 0..writes {
        for (at, byte) in buffer[..WRITE_BYTES].iter_mut().enumerate() {
            *byte = pattern(write * WRITE_BYTES + at);
        }
        writer.write_kept(&mut buffer, WRITE_BYTES, write % 3 != 2).unwrap();
        assert_eq!(buffer.len(), 2 * WRITE_BYTES);
        buffer.fill(0xee);
        said.extend(writer.says());
    }
    assert_eq!(writer.bytes_on_wire(), (writes * WRITE_BYTES) as u64);
    writer.finish().unwrap();
    said
}

#[test]
fn what_was_written_arrives_however_late_and_the_kernels_copies_are_told_of_once() {
    for uri in ["tcp://127.0.0.1:0", "tcp://[::1]:0"] {
        let (_listener, dialled, mut accepted) = data(uri);
        let writing = thread::spawn(|| write_from_one_buffer(dialled, WRITES));
        // Sockets are full, and what was written last has not left.
        thread::sleep(Duration::from_millis(300));
        assert_eq!(read_pattern(&mut *accepted.reader), WRITES * WRITE_BYTES, "{uri}");
        let said = writing.join().unwrap();
        // Loopback brings every packet to a reader, for whom it is copied.
        assert_eq!(said.len(), 1, "{uri}: {said:?}");
        assert!(said[0].contains("pages are copied to be sent"), "{said:?}");
    }
}

#[test]
fn what_was_written_arrives_although_the_writer_leaves_at_once() {
    let (_listener, dialled, mut accepted) = data("tcp://127.0.0.1:0");
    let writing = thread::spawn(|| write_from_one_buffer(dialled, 2));
    thread::sleep(Duration::from_millis(100));
    assert_eq!(read_pattern(&mut *accepted.reader), 2 * WRITE_BYTES);
    writing.join().unwrap();
}

#[test]
fn other_transports_refuse() {
    for uri in ["unix:/nowhere.sock", &format!("quic://127.0.0.1:7000?fp=sha256:{}", "0".repeat(64))] {
        let refused = connect(&uri.parse().unwrap(), Options { zero_copy: true, ..Options::default() }).err().unwrap();
        assert!(refused.to_string().contains("tcp:// alone"), "{refused}");
    }
}

#[test]
fn hanging_up_ends_a_write_that_waits_for_the_peer() {
    let (_listener, mut dialled, _accepted) = data("tcp://127.0.0.1:0");
    let hang_up = dialled.hang_up.clone();
    let writing = thread::spawn(move || {
        let mut buffer = vec![7; WRITE_BYTES];
        loop {
            if let Err(error) = dialled.writer.write_kept(&mut buffer, WRITE_BYTES, false) {
                return error.kind();
            }
        }
    });
    thread::sleep(Duration::from_millis(200));
    hang_up.hang_up();
    assert_eq!(writing.join().unwrap(), ErrorKind::ConnectionAborted);
}
