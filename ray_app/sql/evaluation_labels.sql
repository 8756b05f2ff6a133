-- name: evaluation_labels
-- purpose: Names of the classes of evaluation samples.
-- param: analysis - id of the analysis that holds the samples
-- grain: one row per class
select label_id, any_value(label) as label
from evaluation_samples
where analysis = $analysis and label_id is not null
group by label_id
order by label_id
