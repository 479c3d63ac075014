//! Finding out which settings are best for QEMU before it is measured.

use std::path::Path;

use crate::error::Error;
use crate::migration;
use crate::remote::Connection;
use crate::scenario::Scenario;
use crate::setting::Setting;
use crate::summary::Spread;
use crate::vmm::Vmm;

/// How often each candidate is measured.
const RUNS: usize = 2;

/// What was found out.
pub(super) struct Tuning {
    /// The settings with the least total time.
    pub(super) best: Vec<Setting>,
    /// What each took, for the report.
    pub(super) note: String,
}

/// Measures every candidate of the scenario. One that QEMU refuses is no candidate.
pub(super) fn qemu(
    vmm: &dyn Vmm,
    scenario: &Scenario,
    mut agent: Option<&mut Connection>,
    dir: &Path,
    mut before_each: impl FnMut(&str),
) -> Result<Tuning, Error> {
    let mut totals = Vec::new();
    for settings in &scenario.qemu_candidates {
        before_each(&format!("tuning {}: {}", vmm.name(), name(settings)));
        let mut tried = scenario.clone();
        let required = settings.iter().cloned().map(|setting| Setting {
            required: true,
            ..setting
        });
        tried.settings.qemu = required.collect();
        totals.push((settings, total(vmm, &tried, agent.as_deref_mut(), dir)?));
    }
    let best = best(&totals).ok_or_else(|| {
        Error::Wrong(format!(
            "{} refuses all that may be best for it: {}",
            vmm.name(),
            told(&totals)
        ))
    })?;
    Ok(Tuning {
        best: best.clone(),
        note: format!(
            "{} was measured with what had the least total time of {RUNS} runs each: {}",
            vmm.name(),
            told(&totals)
        ),
    })
}

/// The median of the total times in ms; `None` if the settings are refused.
fn total(
    vmm: &dyn Vmm,
    scenario: &Scenario,
    mut agent: Option<&mut Connection>,
    dir: &Path,
) -> Result<Option<f64>, Error> {
    let mut totals = Vec::new();
    for _ in 0..RUNS {
        match migration::run(vmm, scenario, agent.as_deref_mut(), dir) {
            Ok(outcome) => totals.push(outcome.total),
            Err(error) if error.is_refusal() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    Ok(Spread::of(totals).map(|spread| spread.median))
}

fn best<'a>(totals: &[(&'a Vec<Setting>, Option<f64>)]) -> Option<&'a Vec<Setting>> {
    let measured = totals
        .iter()
        .filter_map(|(settings, total)| Some((*settings, (*total)?)));
    measured
        .min_by(|(_, one), (_, other)| one.total_cmp(other))
        .map(|(settings, _)| settings)
}

fn told(totals: &[(&Vec<Setting>, Option<f64>)]) -> String {
    let each = totals.iter().map(|(settings, total)| match total {
        Some(total) => format!("{} {total:.0} ms", name(settings)),
        None => format!("{} refused", name(settings)),
    });
    each.collect::<Vec<_>>().join(", ")
}

fn name(settings: &[Setting]) -> String {
    match settings {
        [] => "defaults".to_owned(),
        settings => {
            let each: Vec<String> = settings.iter().map(Setting::to_string).collect();
            each.join(" ")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_total_is_best_and_a_refusal_never() {
        let [plain, zstd, lzo] = ["", "multifd-compression=zstd", "multifd-compression=lzo"]
            .map(|text| text.parse().into_iter().collect::<Vec<Setting>>());
        let totals = [(&lzo, None), (&plain, Some(300.0)), (&zstd, Some(200.4))];
        assert_eq!(best(&totals), Some(&zstd));
        assert_eq!(
            told(&totals),
            "multifd-compression=lzo refused, defaults 300 ms, multifd-compression=zstd 200 ms"
        );
        assert_eq!(best(&[(&lzo, None)]), None);
    }
}
