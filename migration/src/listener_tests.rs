use super::*;
use std::io::Write;
use std::os::unix::net::UnixDatagram;

fn bind(uri: &str) -> Result<Listener, ListenError> {
    Listener::bind(&uri.parse().unwrap())
}

fn dial(listener: &Listener) -> TcpStream {
    let Uri::Tcp { host, port } = listener.uri() else {
        panic!("not TCP")
    };
    TcpStream::connect((host.as_str(), *port)).unwrap()
}

#[test]
fn strangers_neither_end_nor_delay_the_listening() {
    let mut listener = bind("tcp:127.0.0.1:0").unwrap();
    // Silent strangers stay silent for longer than this test may take.
    let deadlines = Deadlines {
        preamble: Duration::from_secs(3600),
        ..Deadlines::default()
    };
    let silent: Vec<_> = (0..MAX_PENDING + 5).map(|_| dial(&listener)).collect();
    let mut web = dial(&listener);
    web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(dial(&listener));
    let mut half = dial(&listener);
    half.write_all(&Preamble::OURS.encode()[..10]).unwrap();
    let mut damaged = Preamble::OURS.encode();
    damaged[9] ^= 1;
    dial(&listener).write_all(&damaged).unwrap();
    let mut source = dial(&listener);
    source.write_all(&Preamble::OURS.encode()).unwrap();

    let cancel = Cancel::new().unwrap();
    let incoming = listener.accept(&cancel, &deadlines).unwrap();
    assert_eq!(incoming.preamble, Preamble::OURS);
    assert_eq!(
        incoming.peer(),
        format!("tcp:{}", source.local_addr().unwrap())
    );
    // And the next one, which says its preamble late.
    half.write_all(&Preamble::OURS.encode()[10..]).unwrap();
    let incoming = listener.accept(&cancel, &deadlines).unwrap();
    assert_eq!(
        incoming.peer(),
        format!("tcp:{}", half.local_addr().unwrap())
    );
    drop(silent);
}

#[test]
fn a_silent_stranger_is_dropped_at_its_deadline() {
    use std::io::Read;
    let mut listener = bind("tcp::0").unwrap();
    let mut silent = dial(&listener);
    let cancel = Cancel::new().unwrap();
    let accepting = std::thread::spawn({
        let cancel = cancel.clone();
        move || {
            let deadlines = Deadlines {
                preamble: Duration::from_millis(20),
                ..Deadlines::default()
            };
            listener.accept(&cancel, &deadlines)
        }
    });
    // The listener closes the connection; then it is woken.
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    cancel.cancel("no more").unwrap();
    assert!(matches!(
        accepting.join().unwrap(),
        Err(ListenError::Cancelled(reason)) if reason == "no more"
    ));
}

/// Says what a connection of a source that is known begins with.
fn say(stream: &mut TcpStream, kind: Kind, id: Id, attempt: u32) {
    let mut body = vec![];
    Return { id, attempt }.encode(&mut body);
    let header = Header {
        kind,
        sequence: 0,
        body_len: body.len() as u32,
        payload_len: 0,
        body_crc: crc32fast::hash(&body),
    };
    let bytes = [&Preamble::OURS.encode()[..], &header.encode(), &body].concat();
    stream.write_all(&bytes).unwrap();
}

fn awaited(kind: Kind, over: &Cancel, later: Option<Kind>) -> Awaited<'_> {
    Awaited {
        kind,
        id: Id([7; 16]),
        attempts: 0..=9,
        until: None,
        beside: None,
        over: Some(over),
        later,
    }
}

#[test]
fn who_is_waited_for_later_stays_whatever_else_it_says() {
    let mut listener = bind("tcp:127.0.0.1:0").unwrap();
    let (cancel, over) = (Cancel::new().unwrap(), Cancel::new().unwrap());
    // Whoever has not said all is dropped at once.
    let deadlines = Deadlines {
        preamble: Duration::ZERO,
        ..Deadlines::default()
    };
    let (id, other) = (Id([7; 16]), Id([8; 16]));
    let mut channels: Vec<_> = (0..3).map(|_| dial(&listener)).collect();
    for (number, channel) in (3..).zip(&mut channels) {
        say(channel, Kind::Channel, id, number);
        channel.write_all(b"and more").unwrap();
    }
    let mut stranger = dial(&listener);
    say(&mut stranger, Kind::Channel, other, 0);
    let mut join = dial(&listener);
    say(&mut join, Kind::Join, id, 1);
    let first = awaited(Kind::Join, &over, Some(Kind::Channel));
    let joined = listener.accept_returning(first, &cancel, &deadlines);
    assert_eq!(joined.unwrap().attempt, 1);
    for number in 3..6 {
        let next = awaited(Kind::Channel, &over, None);
        let channel = listener.accept_returning(next, &cancel, &deadlines);
        assert_eq!(channel.unwrap().attempt, number);
    }
    over.cancel("no more").unwrap();
    let next = awaited(Kind::Channel, &over, None);
    let nobody = listener.accept_returning(next, &cancel, &deadlines);
    assert!(matches!(nobody, Err(ListenError::Nobody)), "{nobody:?}");
}

#[test]
fn qemus_addresses() {
    for (uri, host) in [
        ("tcp::0", "127.0.0.1"),
        ("tcp:0:0", "0.0.0.0"),
        ("tcp:0.0.0.0:0", "0.0.0.0"),
    ] {
        let listener = bind(uri).unwrap();
        let Uri::Tcp { host: real, port } = listener.uri() else {
            panic!("not TCP")
        };
        assert_eq!(real, host);
        assert_ne!(*port, 0);
    }
    match bind("tcp:[::1]:0") {
        Ok(listener) => assert!(listener.uri().to_string().starts_with("tcp:[::1]:")),
        Err(error) => guest_tests::driver::skip(&format!(
            "in part: IPv6: {error}; switch it on for the loopback interface"
        )),
    }
}

#[test]
fn only_stale_sockets_are_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let uri = format!("unix:{}", path.display());
    let first = bind(&uri).unwrap();
    assert!(matches!(bind(&uri), Err(ListenError::InUse(_))));
    drop(first);
    assert!(!path.exists(), "the socket's file was left behind");

    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(bind(&uri).unwrap());

    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&uri), Err(ListenError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();

    let _other = UnixDatagram::bind(&path).unwrap();
    assert!(matches!(bind(&uri), Err(ListenError::InUse(_))));
}
