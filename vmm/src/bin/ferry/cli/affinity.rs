//! `--cpu-affinity`: WHO@CPUS, separated by commas.

use vmm::affinity::Affinity;
use vmm::host_list::parse_list;
use vmm::kvm::MAX_VCPUS;

/// Reads the option. A part without `@` belongs to the CPUs before it: `0@0,2,1@1,3`.
pub(super) fn parse(text: &str) -> Result<Affinity, String> {
    let mut groups: Vec<(&str, String)> = Vec::new();
    for part in text.split(',') {
        match (part.split_once('@'), groups.last_mut()) {
            (Some((who, cpus)), _) => groups.push((who, cpus.to_owned())),
            (None, Some((_, cpus))) => {
                cpus.push(',');
                cpus.push_str(part);
            }
            (None, None) => {
                return Err(format!("'{part}' is not WHO@CPUS, such as 0-3@4-7 or io@0"));
            }
        }
    }
    let mut affinity = Affinity::default();
    for (who, cpus) in groups {
        let cpus = parse_list(&cpus).map_err(|error| format!("{who}@{cpus}: {error}"))?;
        let twice = || format!("'{who}' is given twice");
        let role = match who {
            "io" => &mut affinity.io,
            "migration" => &mut affinity.migration,
            _ => {
                for index in vcpus(who)? {
                    if affinity.vcpus.insert(index, cpus.clone()).is_some() {
                        return Err(format!("vCPU {index} is given twice"));
                    }
                }
                continue;
            }
        };
        if role.replace(cpus).is_some() {
            return Err(twice());
        }
    }
    Ok(affinity)
}

/// What several options say together.
pub(crate) fn merge(options: &[Affinity]) -> Result<Affinity, String> {
    let mut all = Affinity::default();
    for Affinity {
        vcpus,
        io,
        migration,
    } in options.iter().cloned()
    {
        for (index, cpus) in vcpus {
            if all.vcpus.insert(index, cpus).is_some() {
                return Err(format!("--cpu-affinity: vCPU {index} is given twice"));
            }
        }
        for (name, role, given) in [
            ("io", &mut all.io, io),
            ("migration", &mut all.migration, migration),
        ] {
            if role.is_some() && given.is_some() {
                return Err(format!("--cpu-affinity: '{name}' is given twice"));
            }
            *role = role.take().or(given);
        }
    }
    Ok(all)
}

fn vcpus(who: &str) -> Result<Vec<u32>, String> {
    let list = parse_list(who).map_err(|_| {
        format!("'{who}' is no vCPU (0), no range of them (0-3), nor io or migration")
    })?;
    let number = |index: usize| u32::try_from(index).ok().filter(|&index| index < MAX_VCPUS);
    let list = list.into_iter().map(|index| {
        number(index).ok_or_else(|| format!("vCPU {index}: a guest has at most {MAX_VCPUS}"))
    });
    list.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_are_read() {
        let affinity = parse("0@0-3,1@4,6,2-3@5,migration@5-7,io@0").unwrap();
        let vcpus = [
            (0, vec![0, 1, 2, 3]),
            (1, vec![4, 6]),
            (2, vec![5]),
            (3, vec![5]),
        ];
        let expected = Affinity {
            vcpus: vcpus.into(),
            io: Some(vec![0]),
            migration: Some(vec![5, 6, 7]),
        };
        assert_eq!(affinity, expected);
        let parts = ["0@0-3,1@4,6", "2-3@5", "migration@5-7", "io@0"];
        let parts = parts.map(|part| parse(part).unwrap());
        assert_eq!(merge(&parts).unwrap(), expected);
        assert_eq!(merge(&[]).unwrap(), Affinity::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "'' is not WHO@CPUS"),
            ("0-3", "'0-3' is not WHO@CPUS"),
            ("0@", "0@: '' is no number"),
            ("0@a", "0@a: 'a' is no number"),
            ("0@3-1", "ends before it begins"),
            ("disk@1", "'disk' is no vCPU (0)"),
            ("300@1", "vCPU 300: a guest has at most 254"),
            ("0-2@1,1@2", "vCPU 1 is given twice"),
            ("io@1,io@2", "'io' is given twice"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for text in ["0@1", "io@1"] {
            let options = [parse(text).unwrap(), parse(text).unwrap()];
            assert!(merge(&options).unwrap_err().contains("is given twice"));
        }
    }
}
