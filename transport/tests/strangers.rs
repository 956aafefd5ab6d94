//! Peers that are not ours are turned away, and do not keep ours out.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use common::*;
use godwit_core::SessionToken;
use godwit_transport::limits::{PREAMBLE_LIMIT, PREAMBLES_AT_ONCE};
use godwit_transport::preamble::{ANSWER_BYTES, MAJOR, MINOR, Preamble, decode_answer};
use godwit_transport::{Listener, Options, Uri, connect, listen};

fn tcp() -> (Listener, String) {
    let listener = listen(&"tcp://127.0.0.1:0".parse().unwrap(), Options::default()).unwrap();
    let address = match listener.uri() {
        Uri::Tcp(at) => at.to_string(),
        other => panic!("{other}"),
    };
    (listener, address)
}

fn a_proper_peer_gets_in(listener: &Listener) {
    let dial = connect(listener.uri(), Options::default()).unwrap();
    let mut dialled = dial.control(LIMIT).unwrap();
    let mut accepted = listener.next_control(LIMIT).unwrap().unwrap();
    dialled.writer.write_all(&[1]).unwrap();
    assert_eq!(accepted.reader.read(&mut [0]).unwrap(), 1);
}

/// What the listener says to a stranger before it closes the connection, which it must do soon.
fn read_to_close(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
    said
}

#[test]
fn http_garbage_and_oversized_preambles_are_turned_away() {
    let (listener, address) = tcp();
    let strangers: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        &[0xa5; 100_000],
        &[0; 8],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ];
    for (count, stranger) in strangers.into_iter().enumerate() {
        let mut stream = TcpStream::connect(&address).unwrap();
        let _ = stream.write_all(stranger);
        assert_eq!(read_to_close(&mut stream), b"");
        assert_eq!(listener.turned_away(), count as u64 + 1);
        a_proper_peer_gets_in(&listener);
    }
}

#[test]
fn every_truncated_preamble_is_turned_away() {
    let (listener, address) = tcp();
    let preamble = Preamble::Control.encode();
    for length in 0..preamble.len() {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(&preamble[..length]).unwrap();
        drop(stream);
    }
    eventually("all were turned away", || listener.turned_away() == preamble.len() as u64);
    a_proper_peer_gets_in(&listener);
}

#[test]
fn another_version_is_told_ours() {
    let (listener, address) = tcp();
    let mut preamble = Preamble::Control.encode();
    preamble[8] = 9;
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.write_all(&preamble).unwrap();
    let answer: [u8; ANSWER_BYTES] = read_to_close(&mut stream).try_into().unwrap();
    let refusal = decode_answer(&answer).unwrap().unwrap_err().to_string();
    assert!(refusal.contains(&format!("version {MAJOR}.{MINOR}")), "{refusal}");
    a_proper_peer_gets_in(&listener);
}

#[test]
fn silent_and_slow_strangers_keep_nobody_out_and_time_out() {
    let (listener, address) = tcp();
    let mut silent = TcpStream::connect(&address).unwrap();
    let mut slow = TcpStream::connect(&address).unwrap();
    a_proper_peer_gets_in(&listener);

    // A byte a quarter second would take 8 s for the whole preamble.
    let since = Instant::now();
    for byte in Preamble::Control.encode() {
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(250));
    }
    assert_eq!(read_to_close(&mut silent), b"");
    assert_eq!(read_to_close(&mut slow), b"");
    assert!(since.elapsed() < PREAMBLE_LIMIT + Duration::from_secs(4), "{:?}", since.elapsed());
    assert_eq!(listener.turned_away(), 2);
    a_proper_peer_gets_in(&listener);
}

#[test]
fn a_crowd_of_silent_strangers_keeps_nobody_out() {
    let (listener, address) = tcp();
    let crowd: Vec<_> = (0..PREAMBLES_AT_ONCE + 20).map(|_| TcpStream::connect(&address).unwrap()).collect();
    a_proper_peer_gets_in(&listener);
    // The oldest made room.
    eventually("the oldest are gone", || listener.turned_away() >= 20);
    assert!(listener.turned_away() < PREAMBLES_AT_ONCE as u64);
    drop(crowd);
}

#[test]
fn a_stream_stranger_on_a_unix_socket() {
    let places = Places::new();
    let uri = places.all().pop().unwrap();
    let listener = listen(&uri, Options::default()).unwrap();
    let Uri::Unix(path) = listener.uri() else { panic!() };
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    eventually("it was turned away", || listener.turned_away() == 1);
    a_proper_peer_gets_in(&listener);
}

#[test]
fn random_datagrams_do_not_disturb_quic() {
    let listener = listen(&"quic://127.0.0.1:0".parse().unwrap(), Options::default()).unwrap();
    let Uri::Quic { at, .. } = listener.uri().clone() else { panic!() };
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for length in [0, 1, 20, 1200, 1500] {
        for fill in [0x00, 0x40, 0xc3, 0xff] {
            socket.send_to(&vec![fill; length], at.to_string()).unwrap();
        }
    }
    socket.send_to(b"GET / HTTP/1.1\r\n\r\n", at.to_string()).unwrap();
    a_proper_peer_gets_in(&listener);
}

#[test]
fn the_wrong_fingerprint_is_refused_before_anything_is_sent() {
    let listener = listen(&"quic://127.0.0.1:0".parse().unwrap(), Options::default()).unwrap();
    let Uri::Quic { at, fingerprint } = listener.uri().clone() else { panic!() };
    let mut wrong = fingerprint.unwrap();
    wrong.0[31] ^= 1;
    let dial = connect(&Uri::Quic { at: at.clone(), fingerprint: Some(wrong) }, Options::default()).unwrap();
    let error = dial.control(LIMIT).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    assert!(error.to_string().contains(&fingerprint.unwrap().to_string()), "{error}");
    assert!(listener.next_control(Duration::from_millis(50)).unwrap().is_none());
    a_proper_peer_gets_in(&listener);

    let without = connect(&Uri::Quic { at, fingerprint: None }, Options::default()).err().unwrap();
    assert!(without.to_string().contains("no certificate fingerprint"), "{without}");
}

#[test]
fn dialling_something_else_says_so() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri: Uri = format!("tcp://{}", other.local_addr().unwrap()).parse().unwrap();
    let answers: [&[u8]; 3] = [b"SSH-2.0-OpenSSH_9.9 Debian\r\n", b"HTTP/1.1 400 Bad Request\r\n", b""];
    let server = thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = other.accept().unwrap();
            stream.read_exact(&mut [0; 32]).unwrap();
            stream.write_all(answer).unwrap();
        }
        other
    });
    let dial = connect(&uri, Options::default()).unwrap();
    for answer in answers {
        let error = dial.control(LIMIT).err().unwrap().to_string();
        assert!(error.contains("is not a Godwit receiver"), "{answer:?}: {error}");
    }
    // Somebody who accepts and never answers is a matter of the limit.
    let _silent = server.join().unwrap();
    let since = Instant::now();
    let error = dial.data(SessionToken([0; 16]), 0, Duration::from_millis(300)).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(since.elapsed() < Duration::from_millis(300) + AT_ONCE);
}

#[test]
fn clear_text_off_loopback_needs_insecure() {
    let uri: Uri = "tcp://0.0.0.0:0".parse().unwrap();
    let error = listen(&uri, Options::default()).unwrap_err().to_string();
    assert!(error.contains("--insecure") && error.contains("quic://"), "{error}");
    let listener = listen(&uri, Options { insecure: true, ..Options::default() }).unwrap();
    a_proper_peer_gets_in_at(&listener);

    let error = connect(&"tcp://192.0.2.1:7000".parse().unwrap(), Options::default()).err().unwrap().to_string();
    assert!(error.contains("--insecure"), "{error}");
    assert!(
        connect(&"tcp://192.0.2.1:7000".parse().unwrap(), Options { insecure: true, ..Options::default() }).is_ok()
    );
    let error = connect(&"tcp://127.0.0.1:0".parse().unwrap(), Options::default()).err().unwrap().to_string();
    assert!(error.contains("port 0"), "{error}");
}

fn a_proper_peer_gets_in_at(listener: &Listener) {
    let Uri::Tcp(at) = listener.uri() else { panic!() };
    assert_ne!(at.port, 0);
    let dial = connect(&format!("tcp://127.0.0.1:{}", at.port).parse().unwrap(), Options::default()).unwrap();
    let _dialled = dial.control(LIMIT).unwrap();
    assert!(listener.next_control(LIMIT).unwrap().is_some());
}

#[test]
fn unix_sockets_are_private_not_taken_over_and_cleaned_up() {
    use std::os::unix::fs::PermissionsExt;

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("move.sock");
    let uri = Uri::Unix(path.clone());

    let listener = listen(&uri, Options::default()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let error = listen(&uri, Options::default()).unwrap_err().to_string();
    assert!(error.contains("another process listens there"), "{error}");
    a_proper_peer_gets_in(&listener);
    drop(listener);
    assert!(!path.exists());

    // A socket that its process left behind is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    a_proper_peer_gets_in(&listen(&uri, Options::default()).unwrap());

    std::fs::write(&path, "precious").unwrap();
    let error = listen(&uri, Options::default()).unwrap_err().to_string();
    assert!(error.contains("is not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let long = Uri::Unix(format!("/tmp/{}", "x".repeat(200)).into());
    assert!(listen(&long, Options::default()).is_err());
}
