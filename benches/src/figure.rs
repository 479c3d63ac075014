//! Figures: what each is called, its unit, and what many runs of several VMMs make of it.

use serde::{Serialize, Serializer};

use crate::summary::Spread;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 10⁻³ s.
    Milliseconds,
    /// 10⁻⁶ s.
    Microseconds,
    /// s.
    Seconds,
    /// 2²⁰ bytes.
    Mebibytes,
    /// How many in a second.
    PerSecond,
    /// How many.
    Count,
    /// A part of a whole.
    Share,
}

impl Unit {
    /// As it stands behind a figure's name; empty where none is needed.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Microseconds => "µs",
            Self::Seconds => "s",
            Self::Mebibytes => "MiB",
            Self::PerSecond => "1/s",
            Self::Count | Self::Share => "",
        }
    }
}

impl Serialize for Unit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.symbol())
    }
}

/// One of the figures that a run yields.
#[derive(Debug)]
pub struct Figure<Run: 'static> {
    /// What it is; two spaces before it make it a part of the one above.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// How many digits behind the point mean something.
    pub digits: usize,
    /// Taken out of a run; `None` if that run, or that VMM, does not tell it.
    pub of: fn(&Run) -> Option<f64>,
}

/// What a measurement yields.
pub trait Measured: Serialize + Sized + 'static {
    /// All of its figures, in the order in which they are shown.
    const FIGURES: &'static [Figure<Self>];
    /// Names of those by which VMMs are compared at a glance.
    const HEADLINES: &'static [&'static str];
}

/// One figure of all runs of all VMMs.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it is.
    pub name: String,
    /// What it counts.
    pub unit: Unit,
    /// How many digits behind the point mean something.
    pub digits: usize,
    /// Whether it is one of those to compare by.
    pub headline: bool,
    /// For each VMM, for each run.
    pub values: Vec<Vec<Option<f64>>>,
}

impl Row {
    /// Takes one figure out of the runs of each VMM.
    pub fn of<Run: Measured>(figure: &Figure<Run>, runs: &[Vec<Run>]) -> Self {
        let of_one = |runs: &Vec<Run>| runs.iter().map(figure.of).collect();
        Self {
            name: figure.name.to_owned(),
            unit: figure.unit,
            digits: figure.digits,
            headline: Run::HEADLINES.contains(&figure.name),
            values: runs.iter().map(of_one).collect(),
        }
    }

    /// All figures of the runs, those left out that no VMM tells.
    pub fn all<Run: Measured>(runs: &[Vec<Run>]) -> Vec<Self> {
        let rows = Run::FIGURES.iter().map(|figure| Self::of(figure, runs));
        rows.filter(|row| row.values.iter().flatten().any(Option::is_some))
            .collect()
    }

    /// The name with its unit.
    pub fn label(&self) -> String {
        match self.unit.symbol() {
            "" => self.name.clone(),
            unit => format!("{}, {unit}", self.name),
        }
    }

    /// Over the runs of one VMM.
    pub fn spread(&self, vmm: usize) -> Option<Spread> {
        Spread::of(self.values.get(vmm)?.iter().copied().flatten())
    }

    /// The first VMM's figure divided by that VMM's, of the runs that were made right after each
    /// other, which a busy machine has hurt alike. `None` where one of them is missing, or the
    /// divisor is not above 0.
    pub fn ratios(&self, vmm: usize) -> Vec<Option<f64>> {
        let (Some(ours), Some(theirs)) = (self.values.first(), self.values.get(vmm)) else {
            return Vec::new();
        };
        let pairs = ours.iter().zip(theirs);
        pairs
            .map(|(ours, theirs)| match (ours, theirs) {
                (Some(ours), Some(theirs)) if *theirs > 0.0 => Some(ours / theirs),
                _ => None,
            })
            .collect()
    }

    /// Over the ratios of all pairs: its median is not the ratio of the medians.
    pub fn ratio(&self, vmm: usize) -> Option<Spread> {
        Spread::of(self.ratios(vmm).into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: [&[Option<f64>]; 2]) -> Row {
        Row {
            name: "total".to_owned(),
            unit: Unit::Milliseconds,
            digits: 1,
            headline: true,
            values: values.map(<[_]>::to_vec).to_vec(),
        }
    }

    #[test]
    fn ratios_are_of_pairs_and_not_of_medians() {
        let row = row([
            &[Some(1.0), Some(10.0), Some(3.0)],
            &[Some(2.0), Some(20.0), Some(3.0)],
        ]);
        let ratio = row.ratio(1).unwrap();
        assert_eq!(
            ratio,
            Spread {
                median: 0.5,
                min: 0.5,
                max: 1.0
            }
        );
        assert_eq!(row.spread(0).unwrap().median, 3.0);
        assert_eq!(row.spread(2), None);
    }

    #[test]
    fn a_missing_figure_does_not_shift_the_pairs() {
        let row = row([
            &[None, Some(10.0), Some(3.0)],
            &[Some(2.0), Some(5.0), Some(0.0)],
        ]);
        assert_eq!(row.ratios(1), [None, Some(2.0), None]);
        assert_eq!(row.spread(0).unwrap().median, 6.5);
    }

    #[derive(Serialize)]
    struct Run(Option<f64>);

    impl Measured for Run {
        const FIGURES: &'static [Figure<Self>] = &[
            Figure {
                name: "told",
                unit: Unit::Seconds,
                digits: 2,
                of: |run| run.0,
            },
            Figure {
                name: "never told",
                unit: Unit::Count,
                digits: 0,
                of: |_| None,
            },
        ];
        const HEADLINES: &'static [&'static str] = &["told"];
    }

    #[test]
    fn only_what_somebody_tells_is_a_row() {
        let rows = Row::all(&[vec![Run(None)], vec![Run(Some(2.0))]]);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].label(), "told, s");
        assert!(rows[0].headline);
        assert_eq!(rows[0].values, [vec![None], vec![Some(2.0)]]);
    }
}
