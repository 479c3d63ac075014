use super::*;

const MIB: u64 = 1 << 20;

/// A guest of 100 MiB that dirties `writes` bytes a second when nothing holds it back, on a link of 100 MiB/s,
/// in rounds that each send what the round before left, and take a time that is made up.
/// It writes to 60 MiB, and less than 3 MiB are little enough for it to be stopped.
struct Model {
    parameters: ThrottleParameters,
    throttling: Throttling,
    left: f64,
    writes: f64,
}

const BANDWIDTH: f64 = (100 * MIB) as f64;
const WORKING_SET: f64 = (60 * MIB) as f64;
const FITS: f64 = (3 * MIB) as f64;

impl Model {
    fn new(writes: f64) -> Self {
        let parameters = ThrottleParameters::default();
        parameters.set_auto_converge(true);
        Self {
            parameters,
            throttling: Throttling::default(),
            left: BANDWIDTH,
            writes,
        }
    }

    fn round(&mut self) -> Option<Throttle> {
        if self.left < FITS {
            return None;
        }
        let time = self.left / BANDWIDTH;
        let share = f64::from(self.throttling.current().share().unwrap_or(0)) / 100.0;
        let dirtied = (self.writes * (1.0 - share) * time).min(WORKING_SET);
        let moved = Moved {
            time: Duration::from_secs_f64(time),
            sent: self.left as u64,
            dirtied: dirtied as u64,
            bandwidth: Some(BANDWIDTH),
        };
        self.left = dirtied;
        self.throttling.round_ended(&self.parameters, moved)
    }

    /// What it was throttled to, one after the other, in so many rounds.
    fn steps(&mut self, rounds: usize) -> Vec<u8> {
        (0..rounds).filter_map(|_| self.round()?.share()).collect()
    }
}

#[test]
fn a_guest_that_converges_is_left_alone() {
    let mut model = Model::new(0.4 * BANDWIDTH);
    assert!(model.steps(100).is_empty());
    assert_eq!(model.throttling.current(), Throttle::Off);
}

#[test]
fn one_that_does_not_is_slowed_step_by_step_until_it_does() {
    let mut model = Model::new(1.2 * BANDWIDTH);
    // Not after one period, but after two.
    assert_eq!(model.round(), None);
    assert_eq!(model.round(), Some(Throttle::Share(20)));
    assert_eq!(model.steps(200), [30, 40, 50, 60]);
    assert!(model.left < FITS, "{} left", model.left);
}

#[test]
fn there_is_a_most_that_it_is_slowed_by() {
    let mut model = Model::new(1000.0 * BANDWIDTH);
    model.parameters.set_initial(55).unwrap();
    model.parameters.set_increment(30).unwrap();
    model.parameters.set_max(90).unwrap();
    assert_eq!(model.steps(30), [55, 85, 90]);
}

#[test]
fn near_the_goal_steps_get_smaller_if_asked_for() {
    let mut model = Model::new(0.7 * BANDWIDTH);
    model.parameters.set_tailslow(true);
    model.parameters.set_increment(50).unwrap();
    // 20 % leave 0.56 of the link, so 11 % of what is left are enough.
    assert_eq!(model.steps(50), [20, 29]);
}

#[test]
fn one_period_of_many_writes_is_no_reason() {
    let mut throttling = Throttling::default();
    let parameters = ThrottleParameters::default();
    parameters.set_auto_converge(true);
    for round in 1..20 {
        let moved = Moved {
            time: Duration::from_secs(1),
            sent: 100,
            dirtied: if round % 2 == 0 { 10 } else { 90 },
            bandwidth: None,
        };
        assert_eq!(throttling.round_ended(&parameters, moved), None);
    }
}

#[test]
fn short_rounds_count_together() {
    let mut throttling = Throttling::default();
    let parameters = ThrottleParameters::default();
    parameters.set_auto_converge(true);
    let moved = Moved {
        time: Duration::from_millis(10),
        sent: 100,
        dirtied: 90,
        bandwidth: None,
    };
    for _ in 1..40 {
        assert_eq!(throttling.round_ended(&parameters, moved), None);
    }
    let throttle = throttling.round_ended(&parameters, moved);
    assert_eq!(throttle, Some(Throttle::Share(20)));
}

#[test]
fn off_is_off_and_the_end_is_told_once() {
    let mut model = Model::new(5.0 * BANDWIDTH);
    model.parameters.set_auto_converge(false);
    assert!(model.steps(20).is_empty());
    assert!(!model.throttling.end());
    model.parameters.set_auto_converge(true);
    assert_eq!(model.steps(20).first(), Some(&20));
    assert!(model.throttling.end());
    assert!(!model.throttling.end());
    assert_eq!(model.throttling.current(), Throttle::Off);
}

#[test]
fn a_dirty_limit_goes_by_the_link() {
    let mut model = Model::new(2.0 * BANDWIDTH);
    model.parameters.set_auto_converge(false);
    model.parameters.set_dirty_limit(true);
    model.parameters.set_vcpu_dirty_limit(3);
    let throttles: Vec<_> = (0..4).filter_map(|_| model.round()).collect();
    // Not before the second round, and then again and again.
    assert_eq!(throttles.len(), 3, "{throttles:?}");
    for throttle in throttles {
        let Throttle::DirtyRate {
            total,
            each,
            measured,
        } = throttle
        else {
            panic!("{throttle:?}");
        };
        assert_eq!((total, each), (50 * MIB, 3 * MIB));
        // The working set, in the 0.6 s that it takes.
        assert!(measured.abs_diff(100 * MIB) < MIB, "{measured}");
    }
}

#[test]
fn a_dirty_limit_follows_the_guest_in_periods_that_can_be_set() {
    let parameters = ThrottleParameters::default();
    parameters.set_dirty_limit(true);
    let changes = |period: Option<u64>| {
        if let Some(ms) = period {
            parameters.set_vcpu_dirty_limit_period(ms);
        }
        let mut throttling = Throttling::default();
        let moved = Moved {
            time: Duration::from_millis(50),
            sent: 100,
            dirtied: 90,
            bandwidth: Some(1000.0),
        };
        let changes = (1..=100).filter(|_| throttling.round_ended(&parameters, moved).is_some());
        changes.collect::<Vec<u64>>()
    };
    // That it is slowed down at all is decided after two periods of 200 ms, whatever is set.
    assert_eq!(changes(None)[..3], [8, 12, 16]);
    assert_eq!(changes(Some(1000))[..3], [8, 28, 48]);
    assert_eq!(changes(Some(1))[..3], [8, 9, 10]);
}
