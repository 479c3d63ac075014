use super::*;
use vm_memory::Bytes;

const PAGES: u64 = 16;

fn memory() -> (GuestRam, GuestPages) {
    let len = (PAGES * PAGE_SIZE) as usize;
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    (ram.clone(), GuestPages::new(ram).unwrap())
}

fn run(first: u64, count: u64) -> PageRun {
    PageRun { first, count }
}

fn available() -> bool {
    match Userfault::probe() {
        Ok(()) => true,
        Err(error) => {
            guest_tests::driver::skip(&error.to_string());
            false
        }
    }
}

#[test]
fn filling_stops_at_a_page_that_is_there() {
    if !available() {
        return;
    }
    let (ram, memory) = memory();
    let userfault = Userfault::open().unwrap();
    userfault.register(&memory, run(0, PAGES)).unwrap();
    let page = |byte: u8, pages: u64| vec![byte; (pages * PAGE_SIZE) as usize];
    assert_eq!(userfault.copy(&memory, run(5, 1), &page(1, 1)).unwrap(), 1);
    assert_eq!(userfault.copy(&memory, run(2, 8), &page(2, 8)).unwrap(), 3);
    assert_eq!(userfault.copy(&memory, run(5, 5), &page(2, 5)).unwrap(), 0);
    assert_eq!(userfault.zero(&memory, run(0, 4)).unwrap(), 2);
    assert_eq!(userfault.zero(&memory, run(6, 10)).unwrap(), 10);
    let first = |page: u64| ram.read_obj::<u8>(GuestAddress(page * PAGE_SIZE)).unwrap();
    let found: Vec<_> = (0..PAGES).map(first).collect();
    assert_eq!(found, [0, 0, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let error = userfault.copy(&memory, run(0, 1), &page(1, 1));
    assert_eq!(error.unwrap(), 0);
}

#[test]
fn memory_that_is_not_watched_is_refused() {
    if !available() {
        return;
    }
    let (_ram, memory) = memory();
    let userfault = Userfault::open().unwrap();
    let data = [0; PAGE_SIZE as usize];
    let error = userfault.copy(&memory, run(1, 1), &data).unwrap_err();
    assert!(error.to_string().contains("0x1000"), "{error}");
}

#[test]
fn faults_name_their_page_and_thread() {
    if !available() {
        return;
    }
    let (ram, memory) = memory();
    let userfault = Userfault::open().unwrap();
    userfault.register(&memory, run(0, PAGES)).unwrap();
    let mut faults = Vec::new();
    userfault.read_faults(&mut faults).unwrap();
    assert_eq!(faults, []);
    let reader = std::thread::spawn(move || {
        let value = ram.read_obj::<u64>(GuestAddress(3 * PAGE_SIZE + 8));
        (rustix::thread::gettid(), value.unwrap())
    });
    wait(&userfault, &mut faults);
    let data = [7; PAGE_SIZE as usize];
    userfault.copy(&memory, run(3, 1), &data).unwrap();
    let (thread, value) = reader.join().unwrap();
    assert_eq!(value, u64::from_ne_bytes([7; 8]));
    let [fault] = faults[..] else {
        panic!("{faults:?}");
    };
    assert_eq!(memory.page_at_host_address(fault.address), Some(3));
    if userfault.tells_threads() {
        assert_eq!(fault.thread, Some(thread.as_raw_nonzero().get() as u32));
    }
}

fn wait(userfault: &Userfault, faults: &mut Vec<Fault>) {
    let mut fds = [rustix::event::PollFd::new(
        userfault,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
    userfault.read_faults(faults).unwrap();
}
