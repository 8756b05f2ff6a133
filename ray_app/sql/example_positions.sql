-- name: example_positions
-- purpose: Whether more context helps the model.
-- grain: one row per (position, of 16 each)
select position // 16 * 16 as from_position, count(loss) as predictions, round(avg(loss), 3) as loss
from tokens
where position > 0
group by from_position
order by from_position
