//! Pictures of migrations.

use super::{Outcome, Round};
use crate::report::Section;
use crate::report::plot::{Plot, Series, Style};

const MIB: f64 = (1 << 20) as f64;

/// A page, in MiB: what a logarithmic axis begins with.
const PAGE: f64 = 4096.0 / MIB;

/// All pictures of a section about migrations, whose runs these are.
pub fn all(section: &Section, runs: &[Vec<Outcome>]) -> Vec<Plot> {
    let mut plots = vec![convergence(&section.vmms, runs)];
    let of_each = section.vmms.iter().zip(runs);
    plots.extend(of_each.filter_map(|(vmm, runs)| Some(rounds(vmm, typical(runs)?))));
    plots.push(downtimes(&section.vmms, runs));
    plots.extend((1..section.vmms.len()).map(|other| ratios(section, other)));
    plots
}

/// The run whose total is in the middle.
fn typical(runs: &[Outcome]) -> Option<&Outcome> {
    let mut sorted: Vec<&Outcome> = runs.iter().collect();
    sorted.sort_by(|a, b| a.total.total_cmp(&b.total));
    sorted.get(sorted.len() / 2).copied()
}

fn line(name: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Series {
    Series {
        name: name.to_owned(),
        style: Style::Line,
        lines: vec![points.into_iter().collect()],
    }
}

/// What was left at the beginning of each round, and nothing at the end.
fn convergence(vmms: &[String], runs: &[Vec<Outcome>]) -> Plot {
    let left = |run: &Outcome| {
        let rounds = run.convergence.iter();
        let mut points: Vec<_> = rounds
            .map(|round| (round.begin, round.to_send as f64 / MIB))
            .collect();
        if !points.is_empty() {
            points.push((run.total, 0.0));
        }
        points
    };
    let series = vmms.iter().zip(runs).map(|(name, runs)| Series {
        name: name.clone(),
        style: Style::Steps,
        lines: runs.iter().map(left).collect(),
    });
    Plot {
        title: "Left to send when a round begins, every run".to_owned(),
        x: "ms from the command on".to_owned(),
        whole_x: false,
        y: "MiB (bottom: nothing)".to_owned(),
        log_from: Some(PAGE),
        series: series.collect(),
    }
}

/// One run round by round.
fn rounds(vmm: &str, run: &Outcome) -> Plot {
    let series = |name, of: fn(&Round) -> Option<u64>| {
        let points = run.convergence.iter();
        line(
            name,
            points.filter_map(|round| Some((round.number as f64, of(round)? as f64 / MIB))),
        )
    };
    Plot {
        title: format!("{vmm}: rounds of the run with the median total"),
        x: "round".to_owned(),
        whole_x: true,
        y: "MiB (bottom: nothing)".to_owned(),
        log_from: Some(PAGE),
        series: vec![
            series("left to send", |round| Some(round.to_send)),
            series("sent", |round| Some(round.sent)),
            series("dirty at its end", |round| round.dirtied),
        ],
    }
}

/// What an observer felt against what the VMM says.
fn downtimes(vmms: &[String], runs: &[Vec<Outcome>]) -> Plot {
    let point = |run: &Outcome| (run.reported.total, run.felt);
    let greatest = runs.iter().flatten().map(point);
    let greatest = greatest.fold(0.0, |most: f64, (x, y)| most.max(x).max(y));
    let mut series: Vec<Series> = vmms
        .iter()
        .zip(runs)
        .map(|(name, runs)| Series {
            name: name.clone(),
            style: Style::Points,
            lines: vec![runs.iter().map(point).collect()],
        })
        .collect();
    series.push(Series {
        name: "as reported".to_owned(),
        style: Style::Guide,
        lines: vec![vec![(0.0, 0.0), (greatest, greatest)]],
    });
    Plot {
        title: "Downtime, felt and reported, every run".to_owned(),
        x: "reported, ms".to_owned(),
        whole_x: false,
        y: "felt, ms".to_owned(),
        log_from: None,
        series,
    }
}

/// The headline figures of the first VMM by those of another, pair by pair.
fn ratios(section: &Section, other: usize) -> Plot {
    const SHOWN: [&str; 4] = ["total", "downtime felt", "sent", "CPU beside the vCPUs"];
    let shown = section.rows.iter();
    let mut series: Vec<Series> = shown
        .filter(|row| SHOWN.contains(&row.name.as_str()))
        .map(|row| {
            let pairs = (1u32..).zip(row.ratios(other));
            let points = pairs.filter_map(|(run, ratio)| Some((f64::from(run), ratio?)));
            Series {
                name: row.name.clone(),
                style: Style::Points,
                lines: vec![points.collect()],
            }
        })
        .collect();
    let runs = section.rows.iter().map(|row| row.ratios(other).len()).max();
    let last = runs.unwrap_or_default() as f64;
    series.push(Series {
        name: "the same".to_owned(),
        style: Style::Guide,
        lines: vec![vec![(0.5, 1.0), (last + 0.5, 1.0)]],
    });
    let name = |vmm: usize| {
        section
            .vmms
            .get(vmm)
            .map(String::as_str)
            .unwrap_or_default()
    };
    Plot {
        title: format!("{} by {}, pair by pair", name(0), name(other)),
        x: "run".to_owned(),
        whole_x: true,
        y: "ratio".to_owned(),
        log_from: None,
        series,
    }
}
