//! How long the guest waited for pages after it had moved.

use super::Outcome;

/// The waits of all runs of one VMM, as the share that was over before each power of two of
/// microseconds; `None` if it tells of none.
pub fn distribution(runs: &[Outcome]) -> Option<String> {
    let told = runs.iter().filter_map(|run| run.postcopy.as_ref());
    let mut counts: Vec<u64> = Vec::new();
    for waits in told.map(|postcopy| &postcopy.waits) {
        counts.resize(counts.len().max(waits.len()), 0);
        for (sum, count) in counts.iter_mut().zip(waits) {
            *sum += count;
        }
    }
    let all: u64 = counts.iter().sum();
    let last = counts.iter().rposition(|count| *count > 0)?;
    let mut below = 0;
    let shares: Vec<String> = (1..)
        .zip(&counts[..=last])
        .filter_map(|(power, count)| {
            below += count;
            let share = 100.0 * below as f64 / all as f64;
            (*count > 0).then(|| format!("{share:.1} % below {}", time(power)))
        })
        .collect();
    Some(format!("{all} waits for pages: {}", shares.join(", ")))
}

/// 2^`power` µs.
fn time(power: i32) -> String {
    let microseconds = 2f64.powi(power);
    if microseconds < 1000.0 {
        format!("{microseconds} µs")
    } else {
        format!("{:.1} ms", microseconds / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Postcopy;

    fn run(waits: Vec<u64>) -> Outcome {
        let postcopy = Postcopy {
            waits,
            ..Postcopy::default()
        };
        Outcome {
            postcopy: Some(postcopy),
            ..Outcome::default()
        }
    }

    #[test]
    fn all_runs_count_together() {
        let runs = [run(vec![0, 0, 1]), run(vec![]), run(vec![0, 0, 4, 0, 5, 0])];
        let said = distribution(&runs).unwrap();
        assert_eq!(
            said,
            "10 waits for pages: 50.0 % below 8 µs, 100.0 % below 32 µs"
        );
        let said = distribution(&[run([[0; 11].as_slice(), &[1]].concat())]).unwrap();
        assert_eq!(said, "1 waits for pages: 100.0 % below 4.1 ms");
        assert_eq!(distribution(&[run(vec![]), Outcome::default()]), None);
    }
}
