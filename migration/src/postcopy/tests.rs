//! Who may ask what of a migration in post-copy, and when.

use super::*;
use crate::clock::MonotonicClock;

fn progress() -> Arc<Progress> {
    Arc::new(Progress::new(Arc::new(MonotonicClock), None))
}

fn uri(port: u16) -> Uri {
    format!("tcp:127.0.0.1:{port}").parse().unwrap()
}

fn listener() -> Listener {
    Listener::bind(&uri(0)).unwrap()
}

#[test]
fn a_broken_connection_is_replaced_once_and_by_whoever_comes_first() {
    let progress = progress();
    let control = Control::new(Arc::clone(&progress));
    let not_paused =
        |control: &Control<Uri>| matches!(control.recover(uri(1)), Err(RecoverError::NotPaused));
    assert_eq!(control.pause(), Err(NotActive));
    assert!(not_paused(&control));
    let breaker = Cancel::new().unwrap();
    control.activate(breaker.clone());
    assert_eq!(progress.status(), Status::PostcopyActive);
    assert!(not_paused(&control));
    control.pause().unwrap();
    assert_eq!(breaker.cancelled(), Some("paused by the user"));
    control.paused("it broke".to_owned());
    assert_eq!(progress.status(), Status::PostcopyPaused);
    assert_eq!(progress.snapshot().error.as_deref(), Some("it broke"));
    assert_eq!(control.pause(), Err(NotActive));
    control.recover(uri(2)).unwrap();
    assert_eq!(progress.status(), Status::PostcopyRecover);
    assert!(not_paused(&control));
    assert_eq!(control.wait().unwrap().0, uri(2));
}

#[test]
fn what_replaces_it_can_be_given_up_before_the_engine_has_taken_it() {
    let control = Control::<Uri>::new(progress());
    control.paused(String::new());
    control.recover(uri(1)).unwrap();
    control.pause().unwrap();
    let (_, breaker) = control.wait().unwrap();
    assert_eq!(breaker.cancelled(), Some("paused by the user"));
}

#[test]
fn whoever_waits_is_told_of_the_end() {
    let control = Control::<Uri>::new(progress());
    control.paused(String::new());
    let waiting = std::thread::spawn({
        let control = control.clone();
        move || control.wait()
    });
    control.end("the process ends");
    control.end("later");
    assert!(waiting.join().unwrap().is_none());
    assert_eq!(control.ended().unwrap().reason, "the process ends");
    let breaker = Cancel::new().unwrap();
    control.activate(breaker.clone());
    assert_eq!(breaker.cancelled(), Some("the process ends"));
}

#[test]
fn a_destination_is_paused_until_its_source_has_come_and_if_they_do_not_agree() {
    let progress = progress();
    let control = Control::<Listener>::new(Arc::clone(&progress));
    control.paused(String::new());
    control.recover(listener()).unwrap();
    let (_, first) = control.wait().unwrap();
    assert_eq!(progress.status(), Status::PostcopyPaused);
    assert_eq!(control.pause(), Err(NotActive));
    // Another address takes the place of the first one.
    control.recover(listener()).unwrap();
    assert_eq!(first.cancelled(), Some("another address was given"));
    assert!(!control.agree(Cancel::new().unwrap()));
    control.paused("the first was closed".to_owned());
    let (_, second) = control.wait().unwrap();

    let breaker = Cancel::new().unwrap();
    assert!(control.agree(breaker.clone()));
    assert_eq!(progress.status(), Status::PostcopyRecover);
    let refused = control.recover(listener());
    assert!(matches!(refused, Err(RecoverError::NotPaused)));
    control.pause().unwrap();
    assert!(breaker.cancelled().is_some() && second.cancelled().is_none());
    assert!(control.listen_on(second.clone(), "they differ".to_owned()));
    assert_eq!(progress.status(), Status::PostcopyPaused);
    assert_eq!(progress.snapshot().error.as_deref(), Some("they differ"));
    control.end("it ends");
    assert_eq!(second.cancelled(), Some("it ends"));
    assert!(!control.agree(Cancel::new().unwrap()));
}

#[test]
fn once_all_has_arrived_the_status_stays_and_the_source_may_come_back() {
    let progress = progress();
    let control = Control::new(Arc::clone(&progress));
    control.activate(Cancel::new().unwrap());
    let breaker = Cancel::new().unwrap();
    control.complete(Some(breaker.clone()));
    assert_eq!(control.pause(), Err(NotActive));
    control.paused("it may not know".to_owned());
    control.recover(listener()).unwrap();
    let (_, waker) = control.wait().unwrap();
    assert!(control.agree(Cancel::new().unwrap()));
    assert!(control.listen_on(waker, "again".to_owned()));
    assert!(control.agree(Cancel::new().unwrap()));
    assert_eq!(progress.status(), Status::Completed);
    // The connection may be dead, and not seem so.
    control.recover(listener()).unwrap();
    control.finish();
    let refused = control.recover(listener());
    assert!(matches!(refused, Err(RecoverError::NotPaused)));
    assert_eq!(progress.status(), Status::Completed);
}
