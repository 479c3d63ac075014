use super::saved::SavedConsole;
use super::*;
use crate::state::{decode, encode};
use crate::virtio::F_EVENT_IDX;
use crate::virtio::test_driver::{MEMORY, TestDriver};

/// A host that takes only so much.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<(Vec<u8>, usize)>>);

impl Host {
    fn new(room: usize) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), room))))
    }

    fn make_room(&self, console: &Console, more: usize) {
        self.0.lock().unwrap().1 += more;
        console.output_has_room();
    }

    fn got(&self) -> Vec<u8> {
        self.0.lock().unwrap().0.clone()
    }

    fn wait_for(&self, len: usize) -> Vec<u8> {
        while self.got().len() < len {
            std::thread::yield_now();
        }
        self.got()
    }
}

impl Output for Host {
    fn try_write(&self, bytes: &[u8]) -> usize {
        let (got, room) = &mut *self.0.lock().unwrap();
        let taken = bytes.len().min(*room);
        got.extend(&bytes[..taken]);
        *room -= taken;
        taken
    }
}

const ENDLESS: usize = usize::MAX / 2;

fn console(host: &Host) -> Arc<Console> {
    Arc::new(Console::new(Box::new(host.clone()), Box::new(|| ())).unwrap())
}

fn running(host: &Host) -> (Arc<Console>, TestDriver) {
    let console = console(host);
    let driver = TestDriver::new(console.clone());
    driver.start(F_EVENT_IDX);
    driver.run();
    (console, driver)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn what_the_guest_writes_arrives_in_order() {
    let host = Host::new(ENDLESS);
    let (_, driver) = running(&host);
    let text = pattern(20_000);
    driver.request(TRANSMIT, &[&text[..1], &text[1..9000]], &[]);
    driver.request(TRANSMIT, &[], &[]);
    driver.request(TRANSMIT, &[&text[9000..]], &[16]);
    assert_eq!(host.got(), text);
}

#[test]
fn output_waits_in_the_queue_for_a_host_that_takes_no_more() {
    let host = Host::new(5000);
    let (console, driver) = running(&host);
    let text = pattern(12_000);
    let pending = driver.add(TRANSMIT, &[&text], &[]);
    driver.notify(TRANSMIT);
    host.wait_for(5000);
    driver.pause();
    assert!(driver.take_used(TRANSMIT).is_empty());
    driver.run();
    host.make_room(&console, 2000);
    host.wait_for(7000);
    host.make_room(&console, ENDLESS);
    driver.wait_for(TRANSMIT, &pending);
    assert_eq!(host.got(), text);
}

/// All of the guest's memory in one request: in pieces, with a look around in between.
#[test]
fn a_huge_request_is_sent_like_any_other() {
    let host = Host::new(ENDLESS);
    let (_, driver) = running(&host);
    let len = MEMORY as u32 - 8;
    let head = driver.add_descriptors(TRANSMIT, &[(0, len, 0), (0, len, 0)]);
    driver.notify(TRANSMIT);
    driver.wait_interrupt();
    assert_eq!(driver.take_used(TRANSMIT), [(head, 0)]);
    assert_eq!(host.got().len(), 2 * len as usize);
}

#[test]
fn input_waits_for_buffers_and_then_for_room() {
    let host = Host::new(0);
    let (rooms, room) = std::sync::mpsc::channel();
    let on_room = Box::new(move || rooms.send(()).unwrap());
    let console = Arc::new(Console::new(Box::new(host.clone()), on_room).unwrap());
    let driver = TestDriver::new(console.clone());
    driver.start(F_EVENT_IDX);
    driver.run();
    room.recv().unwrap();
    let keys = pattern(INPUT + 100);
    assert_eq!(console.room(), INPUT);
    assert_eq!(console.receive(&keys[..10]), 10);
    assert_eq!(console.receive(&keys[10..]), INPUT - 10);
    assert_eq!((console.room(), console.receive(&[1])), (0, 0));
    assert!(room.try_recv().is_err());
    let first = driver.add(RECEIVE, &[], &[100, 50]);
    driver.notify(RECEIVE);
    let used = driver.wait_for(RECEIVE, &first);
    assert_eq!((used.written, &used.data[..]), (150, &keys[..150]));
    room.recv().unwrap();
    assert_eq!(console.room(), 150);
    // A buffer that was there before the input.
    let rest = driver.request(RECEIVE, &[], &[INPUT as u32]);
    assert_eq!(rest.data[..INPUT - 150], keys[150..INPUT]);
    assert_eq!(rest.written as usize, INPUT - 150);
    let waiting = driver.add(RECEIVE, &[], &[64]);
    driver.notify(RECEIVE);
    console.receive(b"x");
    let used = driver.wait_for(RECEIVE, &waiting);
    assert_eq!((used.written, used.data[0]), (1, b'x'));
}

#[test]
fn a_buffer_without_room_is_given_back() {
    let (console, driver) = running(&Host::new(0));
    console.receive(b"ab");
    let useless = driver.request(RECEIVE, &[b"?"], &[]);
    assert_eq!(useless.written, 0);
    let used = driver.request(RECEIVE, &[], &[2]);
    assert_eq!(used.data, b"ab");
}

#[test]
fn a_reset_forgets_what_was_typed_and_what_was_sent() {
    let host = Host::new(3);
    let (console, driver) = running(&host);
    console.receive(b"typed");
    driver.add(TRANSMIT, &[b"sent in part"], &[]);
    driver.notify(TRANSMIT);
    host.wait_for(3);
    driver.set(0x70, 0);
    assert_eq!(console.room(), INPUT);
    driver.start(0);
    host.make_room(&console, ENDLESS);
    driver.request(TRANSMIT, &[b"anew"], &[]);
    assert_eq!(host.got(), b"senanew");
}

fn saved(console: &Console) -> SavedConsole {
    decode(NAME, &console.save().unwrap()).unwrap()
}

#[test]
fn each_byte_moves_once() {
    let host = Host::new(5000);
    let (console, driver) = running(&host);
    let text = pattern(9000);
    let pending = driver.add(TRANSMIT, &[&text], &[]);
    driver.notify(TRANSMIT);
    host.wait_for(5000);
    console.receive(b"typed ahead");
    driver.pause();
    let there = Host::new(ENDLESS);
    let arrived = self::console(&there);
    let moved = driver.migrate_to(arrived.clone());
    assert_eq!(saved(&arrived), saved(&console));
    assert_eq!(saved(&console).transmitted, 5000);
    assert_eq!(
        moved.transport.save().unwrap(),
        driver.transport.save().unwrap()
    );
    moved.run();
    moved.wait_for(TRANSMIT, &pending);
    assert_eq!([host.got(), there.got()].concat(), text);
    let used = moved.request(RECEIVE, &[], &[64]);
    assert_eq!(&used.data[..used.written as usize], b"typed ahead");
}

/// The first version's bytes: they must load for ever.
#[test]
fn version_1_still_loads() {
    let golden = include_bytes!("../../../golden/virtio-console-1.bin");
    let console = console(&Host::default());
    console.restore(1, golden).unwrap();
    assert_eq!(console.save().unwrap(), golden);
    assert_eq!(
        saved(&console),
        SavedConsole {
            input: b"ls\r".to_vec(),
            transmitted: 77,
        }
    );
}

#[test]
fn every_field_is_checked() {
    let console = console(&Host::default());
    console.receive(b"a");
    let good = saved(&console);
    type Corrupt = fn(&mut SavedConsole);
    let ways: [(&str, Corrupt); 2] = [
        ("input", |s| s.input = vec![0; INPUT + 1]),
        ("transmitted", |s| s.transmitted = (1 << 32) + 1),
    ];
    for (field, corrupt) in ways {
        let mut bad = good.clone();
        corrupt(&mut bad);
        let error = console
            .restore(1, &encode(NAME, &bad).unwrap())
            .unwrap_err();
        let expected = format!("virtio-console: saved field '{field}' is ");
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(saved(&console), good, "after an error it is as it was");
    }
    // A length that no memory could hold is refused before it is asked for.
    let mut endless = encode(NAME, &good).unwrap();
    endless[..8].fill(0xff);
    assert!(console.restore(1, &endless).is_err());
    // A request that is shorter than what was sent of it has been sent.
    console
        .restore(
            1,
            &encode(
                NAME,
                &SavedConsole {
                    input: vec![],
                    transmitted: 99,
                },
            )
            .unwrap(),
        )
        .unwrap();
    let driver = TestDriver::new(console.clone());
    driver.start(0);
    driver.run();
    driver.request(TRANSMIT, &[b"short"], &[]);
    assert_eq!(saved(&console).transmitted, 0);
}
