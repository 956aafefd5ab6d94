//! Channels of every transport carry bytes, end, and break as the engine expects.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Read, Seek, Write};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use godwit_core::memory_files::MAX_FILES;
use godwit_core::{IncomingData, SessionToken};
use godwit_transport::DialError;

const ECHO_BYTES: usize = 64 << 20;

#[test]
fn bytes_arrive_whole_both_ways_at_once() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        thread::scope(|scope| {
            scope.spawn(|| write_pattern(&mut *dialled.writer, ECHO_BYTES));
            scope.spawn(|| write_pattern(&mut *accepted.writer, ECHO_BYTES));
            let there = scope.spawn(|| read_pattern(&mut *accepted.reader));
            assert_eq!(read_pattern(&mut *dialled.reader), ECHO_BYTES, "{uri}");
            assert_eq!(there.join().unwrap(), ECHO_BYTES, "{uri}");
        });
        let on_wire = dialled.writer.bytes_on_wire();
        assert!(on_wire >= ECHO_BYTES as u64 && on_wire < (ECHO_BYTES + ECHO_BYTES / 4) as u64, "{uri}: {on_wire}");
    }
}

#[test]
fn an_echo_answers_byte_by_byte() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        let echo = thread::spawn(move || {
            let mut byte = [0];
            while accepted.reader.read(&mut byte).unwrap() == 1 {
                accepted.writer.write_all(&byte).unwrap();
            }
        });
        for sent in 0..200u8 {
            dialled.writer.write_all(&[sent]).unwrap();
            let mut received = [0];
            assert_eq!(dialled.reader.read(&mut received).unwrap(), 1);
            assert_eq!(received[0], sent);
        }
        drop(dialled);
        echo.join().unwrap();
    }
}

#[test]
fn hanging_up_ends_a_blocked_read() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        let hang_up = dialled.hang_up.clone();
        let result = ends_at_once(move || dialled.reader.read(&mut [0]), || hang_up.hang_up());
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionAborted, "{uri}");
        // The peer hears of it too, as an end or as an error.
        assert!(!matches!(accepted.reader.read(&mut [0]), Ok(1)), "{uri}");
        hang_up.hang_up();
    }
}

#[test]
fn hanging_up_ends_a_blocked_write() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, _accepted) = control(&uri);
        let hang_up = dialled.hang_up.clone();
        let flood = move || {
            let block = vec![0; 1 << 20];
            loop {
                if let Err(error) = dialled.writer.write_all(&block) {
                    return (error, dialled.writer.write_all(&[0]), dialled.writer.finish());
                }
            }
        };
        let (error, later, finish) = ends_at_once(flood, || hang_up.hang_up());
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{uri}");
        assert_eq!(later.unwrap_err().kind(), ErrorKind::ConnectionAborted, "{uri}");
        assert!(finish.is_err(), "{uri}");
    }
}

#[test]
fn reads_fail_after_hanging_up_even_if_bytes_wait() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        accepted.writer.write_all(b"ab").unwrap();
        assert_eq!(dialled.reader.read(&mut [0]).unwrap(), 1);
        dialled.hang_up.hang_up();
        assert!(dialled.reader.read(&mut [0]).is_err(), "{uri}");
    }
}

#[test]
fn the_last_words_arrive_although_the_speaker_leaves_at_once() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        // Unread input must not turn the farewell into a reset.
        dialled.writer.write_all(&[1; 1000]).unwrap();
        accepted.reader.read(&mut [0]).unwrap();
        let words = vec![7; 100_000];
        accepted.writer.write_all(&words).unwrap();
        drop(accepted);

        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match dialled.reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => heard.extend_from_slice(&buffer[..read]),
                Err(error) => panic!("{uri}: after {} bytes: {error}", heard.len()),
            }
        }
        assert_eq!(heard, words, "{uri}");
    }
}

#[test]
fn a_kept_hang_up_does_not_hold_the_connection() {
    for uri in Places::new().all() {
        let (_listener, dialled, mut accepted) = control(&uri);
        let kept = dialled.hang_up.clone();
        drop(dialled);
        assert!(!matches!(accepted.reader.read(&mut [0]), Ok(1)), "{uri}");
        eventually("the peer's write fails", || accepted.writer.write_all(&[0; 4096]).is_err());
        kept.hang_up();
    }
}

#[test]
fn data_channels_find_their_session_and_no_other() {
    for uri in Places::new().all() {
        let (listener, dial) = pair(&uri);
        let mut incoming = listener.incoming_data();
        let (ours, theirs) = (SessionToken([1; 16]), SessionToken([2; 16]));

        let early = dial.data(ours, 0, LIMIT).err().unwrap();
        assert!(early.to_string().contains("knows no session"), "{uri}: {early}");

        incoming.expect(ours);
        let wrong = dial.data(theirs, 0, LIMIT).err().unwrap();
        assert_eq!(wrong.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(listener.turned_away(), 2);

        for index in [0, 3, u16::MAX] {
            let mut dialled = dial.data(ours, index, LIMIT).unwrap();
            let (got, mut accepted) = incoming.accept(LIMIT).unwrap();
            assert_eq!(got, index, "{uri}");
            dialled.writer.write_all(&[9]).unwrap();
            let mut byte = [0];
            assert_eq!((accepted.reader.read(&mut byte).unwrap(), byte[0]), (1, 9));
        }

        let timed_out = incoming.accept(Duration::from_millis(20)).err().unwrap();
        assert_eq!(timed_out.kind(), ErrorKind::TimedOut);
        drop(incoming);
        assert!(dial.data(ours, 0, LIMIT).is_err(), "{uri}: the session has ended");
    }
}

#[test]
fn control_channels_are_delivered_while_a_session_is_busy() {
    for uri in Places::new().all() {
        let (listener, dial) = pair(&uri);
        let first = dial.control(LIMIT).unwrap();
        let _busy_with = listener.next_control(LIMIT).unwrap().unwrap();
        thread::scope(|scope| {
            let refuser = scope.spawn(|| listener.next_control(LIMIT).unwrap().unwrap());
            let mut second = dial.control(LIMIT).unwrap();
            let mut refused = refuser.join().unwrap();
            refused.writer.write_all(b"busy").unwrap();
            drop(refused);
            let mut words = [0; 4];
            assert_eq!(second.reader.read(&mut words).unwrap(), 4);
            assert_eq!(&words, b"busy");
        });
        drop(first);
    }
}

#[test]
fn closing_the_listener_ends_waits_and_keeps_channels() {
    for uri in Places::new().all() {
        let (listener, mut dialled, mut accepted) = control(&uri);
        let dial = godwit_transport::connect(listener.uri(), Default::default()).unwrap();
        let waited = thread::scope(|scope| {
            let waiting = scope.spawn(|| listener.next_control(LIMIT));
            thread::sleep(Duration::from_millis(50));
            listener.close();
            waiting.join().unwrap()
        });
        assert!(waited.is_err(), "{uri}");
        let since = Instant::now();
        drop(listener);
        assert!(since.elapsed() < AT_ONCE, "{uri}: dropping took {:?}", since.elapsed());
        assert!(dial.control(Duration::from_secs(2)).is_err(), "{uri}");

        dialled.writer.write_all(&[5]).unwrap();
        let mut byte = [0];
        assert_eq!((accepted.reader.read(&mut byte).unwrap(), byte[0]), (1, 5), "{uri}");
    }
}

#[test]
fn dialling_nobody_fails_in_time_and_names_the_uri() {
    for uri in Places::new().all() {
        let (listener, dial) = pair(&uri);
        drop(listener);
        let since = Instant::now();
        let error = dial.control(Duration::from_millis(600)).err().unwrap();
        assert!(since.elapsed() < Duration::from_millis(600) + AT_ONCE, "{uri}: took {:?}", since.elapsed());
        assert!(error.to_string().contains(&dial.uri()), "{uri}: {error}");
        assert!(error.get_ref().unwrap().is::<DialError>());
    }
}

/// Passes datagrams both ways between one dialler and a listener until it is cut, and then nothing.
struct UdpProxy {
    address: std::net::SocketAddr,
    cut: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl UdpProxy {
    fn new(listener: String) -> Self {
        use std::net::UdpSocket;
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, Ordering};

        let (front, back) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        back.connect(listener).unwrap();
        let address = front.local_addr().unwrap();
        let cut = Arc::new(AtomicBool::new(false));
        let (front, back) = (Arc::new(front), Arc::new(back));
        let client = Arc::new(std::sync::OnceLock::new());
        thread::spawn({
            let (front, back, client, cut) = (front.clone(), back.clone(), client.clone(), cut.clone());
            move || {
                let mut datagram = [0; 65_536];
                while let Ok((length, from)) = front.recv_from(&mut datagram) {
                    client.get_or_init(|| from);
                    if !cut.load(Ordering::Relaxed) {
                        let _ = back.send(&datagram[..length]);
                    }
                }
            }
        });
        thread::spawn({
            let cut = cut.clone();
            move || {
                let mut datagram = [0; 65_536];
                while let Ok(length) = back.recv(&mut datagram) {
                    if !cut.load(Ordering::Relaxed) {
                        let _ = front.send_to(&datagram[..length], client.get().unwrap());
                    }
                }
            }
        });
        Self { address, cut }
    }

    fn cut(&self) {
        self.cut.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_silently_cut_quic_link_can_be_hung_up_and_left() {
    use godwit_transport::limits::QUIC_LINGER_LIMIT;
    use godwit_transport::{Options, Uri, connect, listen};

    let listener = listen(&"quic://127.0.0.1:0".parse().unwrap(), Options::default()).unwrap();
    let Uri::Quic { at, fingerprint } = listener.uri().clone() else { panic!() };
    let through_proxy = || {
        let proxy = UdpProxy::new(at.to_string());
        let uri = Uri::Quic { at: proxy.address.into(), fingerprint };
        let dialled = connect(&uri, Options::default()).unwrap().control(LIMIT).unwrap();
        (proxy, dialled, listener.next_control(LIMIT).unwrap().unwrap())
    };

    // A read and a write that wait for the lost peer end at once.
    let (proxy, mut dialled, mut accepted) = through_proxy();
    proxy.cut();
    let hang_up = accepted.hang_up.clone();
    ends_at_once(move || accepted.reader.read(&mut [0]).unwrap_err(), || hang_up.hang_up());
    let hang_up = dialled.hang_up.clone();
    let flood = move || while dialled.writer.write_all(&[0; 65_536]).is_ok() {};
    ends_at_once(flood, || hang_up.hang_up());

    // Without a hang-up, leaving waits for an acknowledgement, but not for ever.
    let (proxy, mut dialled, _accepted) = through_proxy();
    proxy.cut();
    dialled.writer.write_all(b"last words").unwrap();
    let since = Instant::now();
    drop(dialled);
    let took = since.elapsed();
    assert!(took >= QUIC_LINGER_LIMIT && took < QUIC_LINGER_LIMIT + AT_ONCE, "took {took:?}");

    // A dial into the void ends at its limit.
    let proxy = UdpProxy::new(at.to_string());
    proxy.cut();
    let uri = Uri::Quic { at: proxy.address.into(), fingerprint };
    let since = Instant::now();
    let error = connect(&uri, Options::default()).unwrap().control(Duration::from_millis(300)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(since.elapsed() < Duration::from_millis(300) + AT_ONCE);
}

/// Whether this is the file whose contents are `contents`.
fn contains(file: std::os::fd::OwnedFd, contents: &str) -> bool {
    let mut file = std::fs::File::from(file);
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text == contents
}

#[test]
fn files_are_passed_on_over_unix_sockets_and_nothing_else() {
    for uri in Places::new().all() {
        let (_listener, mut dialled, mut accepted) = control(&uri);
        let files = ["one", "two"].map(|contents| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(contents.as_bytes()).unwrap();
            file
        });
        let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let sent = dialled.writer.write_all_with_files(b"here they are", &descriptors);
        if !dialled.writer.passes_files() {
            assert_eq!(sent.unwrap_err().kind(), ErrorKind::Unsupported, "{uri}");
            continue;
        }
        assert!(uri.to_string().starts_with("unix:"), "{uri}");
        sent.unwrap();
        let mut bytes = [0; 13];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += accepted.reader.read(&mut bytes[filled..]).unwrap();
        }
        assert_eq!(&bytes, b"here they are");
        let passed: Vec<_> = accepted.reader.take_files();
        assert_eq!(passed.len(), 2);
        for (file, contents) in passed.into_iter().zip(["one", "two"]) {
            assert!(contains(file, contents));
        }
        assert!(accepted.reader.take_files().is_empty(), "they are handed out once");
    }
}

#[test]
fn a_peer_cannot_make_this_process_keep_many_files() {
    let places = Places::new();
    let uri = places.all().pop().unwrap();
    let (_listener, mut dialled, mut accepted) = control(&uri);
    let file = tempfile::tempfile().unwrap();
    let many = [file.as_fd(); MAX_FILES];
    assert!(dialled.writer.write_all_with_files(b"x", &[file.as_fd(); MAX_FILES + 1]).is_err());
    for _ in 0..3 {
        dialled.writer.write_all_with_files(b"y", &many).unwrap();
        assert_eq!(accepted.reader.read(&mut [0]).unwrap(), 1);
    }
    assert_eq!(accepted.reader.take_files().len(), MAX_FILES);
}
