//! Pings at a steady rate, each with its number, and what became of each.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest_tests::driver::namespace::Namespace;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, ipproto, socket_with, sockopt};

use crate::harness::PATIENCE;

/// How long to wait between two looks at something that changes by itself.
const LOOK: Duration = Duration::from_millis(5);

/// RFC 792.
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;
const HEADER: usize = 8;

/// Sends and receives pings, to and from one address.
struct Socket(File);

impl Socket {
    fn new(namespace: &Namespace, to: Ipv4Addr) -> Self {
        let socket = namespace.within(|| {
            let kind = SocketType::RAW;
            let flags = SocketFlags::CLOEXEC;
            socket_with(AddressFamily::INET, kind, flags, Some(ipproto::ICMP)).unwrap()
        });
        let socket = socket.unwrap();
        connect(&socket, &SocketAddrV4::new(to, 0)).unwrap();
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(LOOK)).unwrap();
        Self(File::from(socket))
    }

    fn try_clone(&self) -> Self {
        Self(self.0.try_clone().unwrap())
    }

    fn send(&mut self, number: usize) -> io::Result<()> {
        let mut packet = [0; HEADER + 8];
        packet[0] = ECHO;
        packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
        packet[HEADER..].copy_from_slice(&(number as u64).to_be_bytes());
        let checksum = checksum(&packet);
        packet[2..4].copy_from_slice(&checksum.to_be_bytes());
        self.0.write_all(&packet)
    }

    /// The number of the ping whose answer comes next; `None` if none comes for a moment.
    fn receive(&mut self) -> Option<usize> {
        let mut packet = [0; 2048];
        let len = match self.0.read(&mut packet) {
            Ok(len) => len,
            // Also "host unreachable", which a raw socket tells of now and then.
            Err(_) => return None,
        };
        let icmp = &packet[usize::from(packet[0] & 0xf) * 4..len];
        if icmp[0] != ECHO_REPLY {
            return None;
        }
        let number = icmp[HEADER..].try_into().expect("what was sent comes back");
        Some(u64::from_be_bytes(number) as usize)
    }
}

/// RFC 1071, of an even number of bytes.
fn checksum(packet: &[u8]) -> u16 {
    let words = packet.chunks_exact(2);
    let sum: u32 = words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// How long an answer takes at most, with one ping at a time.
pub fn slowest_of(count: usize, namespace: &Namespace, to: Ipv4Addr) -> Duration {
    let mut socket = Socket::new(namespace, to);
    let mut slowest = Duration::ZERO;
    for number in 0..count {
        let sent = Instant::now();
        socket.send(number).unwrap();
        while socket.receive() != Some(number) {
            assert!(sent.elapsed() < PATIENCE, "no answer");
        }
        // The first one asks by ARP first.
        if number > 0 {
            slowest = slowest.max(sent.elapsed());
        }
    }
    slowest
}

/// A ping that was sent.
#[derive(Clone, Copy, Debug)]
pub struct Ping {
    pub sent: Instant,
    /// When the answer came.
    pub answered: Option<Instant>,
    /// How often it came.
    answers: u32,
}

/// Threads that ping.
pub struct Pinger {
    pub every: Duration,
    pings: Arc<Mutex<Vec<Ping>>>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pinger {
    /// Pings from now on, never sooner than `every` after the last time.
    pub fn start(namespace: &Namespace, to: Ipv4Addr, every: Duration) -> Self {
        let mut sender = Socket::new(namespace, to);
        let mut receiver = sender.try_clone();
        let pings = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let (sent, until) = (Arc::clone(&pings), Arc::clone(&over));
        let send = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let number = {
                    let mut sent = sent.lock().unwrap();
                    sent.push(Ping {
                        sent: Instant::now(),
                        answered: None,
                        answers: 0,
                    });
                    sent.len() - 1
                };
                // What can't be sent is lost.
                let _ = sender.send(number);
                thread::sleep(every);
            }
        });
        let (answered, until) = (Arc::clone(&pings), Arc::clone(&over));
        let receive = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                if let Some(number) = receiver.receive() {
                    let ping = &mut answered.lock().unwrap()[number];
                    ping.answers += 1;
                    ping.answered.get_or_insert_with(Instant::now);
                }
            }
        });
        Self {
            every,
            pings,
            over,
            threads: vec![send, receive],
        }
    }

    /// Waits until so many of those that are sent from now on are answered.
    pub fn wait_answers(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        let first = self.pings.lock().unwrap().len();
        loop {
            let pings = self.pings.lock().unwrap()[first..].to_vec();
            let answered = pings.iter().filter(|ping| ping.answered.is_some());
            if answered.count() >= count {
                return;
            }
            assert!(Instant::now() < deadline, "no answers to {pings:?}");
            thread::sleep(LOOK);
        }
    }

    /// Ends it; what became of the pings up to the last one that was answered. Answers come in
    /// the order of the pings, so those of them that are not answered never will be.
    pub fn finish(self) -> Vec<Ping> {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        let mut pings = std::mem::take(&mut *self.pings.lock().unwrap());
        let answered = pings.iter().rposition(|ping| ping.answered.is_some());
        pings.truncate(answered.map_or(0, |last| last + 1));
        pings
    }
}

/// Fails unless what was lost is what a stop of this many ms explains: those that were sent in it,
/// and one that was on its way. Returns how many that is.
pub fn check_lost(pings: &[Ping], every: Duration, downtime_ms: u64) -> usize {
    for (number, ping) in pings.iter().enumerate() {
        assert!(ping.answers <= 1, "ping {number} was answered twice");
    }
    let lost: Vec<_> = (0..pings.len())
        .filter(|&number| pings[number].answered.is_none())
        .collect();
    let explained = downtime_ms as u128 / every.as_millis() + 1;
    let (Some(first), Some(last)) = (lost.first(), lost.last()) else {
        return 0;
    };
    let sent_within = pings[*last].sent - pings[*first].sent;
    assert!(
        lost.len() as u128 <= explained,
        "pings {lost:?} of one in {every:?} were lost, sent within {sent_within:?}; a downtime of \
         {downtime_ms} ms explains {explained}"
    );
    assert_eq!(
        last - first + 1,
        lost.len(),
        "lost at several times: {lost:?}"
    );
    lost.len()
}
