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
