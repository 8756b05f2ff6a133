-- name: class_accuracy
-- purpose: How well the model predicts the images of each label.
-- column: run - id of the run
-- column: task - name of the task
-- column: label - label of the images
-- column: label_id - index of its class in the model's output
-- column: num_samples - number of images
-- column: loss - mean loss, in nats
-- column: top1 - share of images whose label was the most probable class
-- column: top10 - share of images whose label was among the ten most probable classes
-- grain: one row per (run, task, label)
select
    run,
    task,
    label,
    label_id,
    count(*) as num_samples,
    -- Threads meet images in any order: fsum carries what rounding loses.
    fsum(loss::double) / count(*) as loss,
    sum(top1::bigint) / count(*) as top1,
    sum(top10::bigint) / count(*) as top10
from predictions
where loss is not null
group by run, task, label, label_id
