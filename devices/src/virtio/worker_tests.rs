use std::sync::mpsc::{Receiver, Sender, channel};

use super::super::rng::Rng;
use super::super::test_driver::TestDriver;
use super::*;

/// Tells what it is asked to do.
struct Teller(Sender<&'static str>);

impl Handler for Teller {
    fn start(&mut self, _: &Arc<Activation>) {
        self.0.send("start").unwrap();
    }
    fn queue_notified(&mut self, _: &Arc<Activation>, _: usize) {
        self.0.send("queue").unwrap();
    }
    fn drain(&mut self, _: &Arc<Activation>) {
        self.0.send("drain").unwrap();
    }
}

fn teller() -> (Worker, Receiver<&'static str>) {
    let (tell, told) = channel();
    (Worker::spawn("teller", &[0], Teller(tell)).unwrap(), told)
}

/// Cannot begin before it is let, like one that reads memory that is not there.
struct Stuck(Receiver<()>, Sender<&'static str>);

impl Handler for Stuck {
    fn start(&mut self, _: &Arc<Activation>) {
        self.0.recv().unwrap();
        self.1.send("start").unwrap();
    }
    fn queue_notified(&mut self, _: &Arc<Activation>, _: usize) {}
    fn drain(&mut self, _: &Arc<Activation>) {
        self.1.send("drain").unwrap();
    }
}

#[test]
fn a_pause_that_takes_too_long_can_be_taken_back() {
    let ((go_on, may_go_on), (tell, told)) = (channel(), channel());
    let worker = Worker::spawn("stuck", &[0], Stuck(may_go_on, tell)).unwrap();
    worker.activate(activation());
    worker.run();
    // It is in `start`, or will be before it does what is asked of it next.
    worker.wait_settled();
    worker.request_pause();
    assert!(!worker.wait_settled_until(Instant::now()));
    worker.run();
    go_on.send(()).unwrap();
    go_on.send(()).unwrap();
    let did: Vec<_> = (0..3).map(|_| told.recv().unwrap()).collect();
    assert_eq!(did, ["start", "drain", "start"]);
    worker.request_pause();
    assert!(worker.wait_settled_until(Instant::now() + LONGEST_WAIT));
    assert_eq!(told.recv().unwrap(), "drain");
}

fn activation() -> Arc<Activation> {
    let driver = TestDriver::new(Arc::new(Rng::new().unwrap()));
    driver.start(0);
    driver.transport.activation_for_tests()
}

#[test]
fn it_works_only_with_a_driver_in_a_machine_that_runs() {
    let (worker, told) = teller();
    worker.run();
    worker.wait_settled();
    let activation = activation();
    activation.notifier(0).unwrap().notify();
    worker.request_pause();
    worker.activate(Arc::clone(&activation));
    worker.wait_settled();
    assert!(told.try_recv().is_err(), "not while it is paused");
    worker.run();
    assert_eq!(told.recv().unwrap(), "start");
    assert_eq!(told.recv().unwrap(), "queue");
    worker.request_pause();
    worker.wait_settled();
    assert_eq!(told.try_recv().unwrap(), "drain");
    activation.notifier(0).unwrap().notify();
    worker.wait_settled();
    assert!(told.try_recv().is_err());
    worker.run();
    assert_eq!(told.recv().unwrap(), "start");
    assert_eq!(told.recv().unwrap(), "queue");
    worker.deactivate();
    assert_eq!(told.try_recv().unwrap(), "drain");
    assert_eq!(Arc::strong_count(&activation), 1);
    drop(worker);
    assert!(told.recv().is_err(), "the thread has ended");
}
